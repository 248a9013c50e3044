"""Checkpoint files in the format their authors released, read without unpickling anything.

Google's ViT archives (.npz) are read here; .pth and .pth.tar files through timm's readers, which
know the wrappings (`model`, `state_dict`, `module.`) and the older names of its models;
.safetensors as they are. Every format ends as one state dict that is compared with the model name
by name.
"""

import argparse
import contextlib
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

# names in Google's archives -> timm's
GOOGLE = (
    (r"^opt/target/", ""),
    (r"^cls$", "cls_token"),
    (r"^embedding/", "patch_embed.proj/"),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
    (r"LayerNorm_0/", "norm1/"),
    (r"LayerNorm_2/", "norm2/"),
    (r"MlpBlock_\d+/Dense_0/", "mlp.fc1/"),
    (r"MlpBlock_\d+/Dense_1/", "mlp.fc2/"),
    (r"MultiHeadDotProductAttention_\d+/out/", "attn.proj/"),
    (r"MultiHeadDotProductAttention_\d+/", "attn."),
    (r"/(kernel|scale)$", ".weight"),
    (r"/bias$", ".bias"),
)


def load_weights(
    net: nn.Module,
    path: Path,
    head: str,
    keep_head: bool = False,
    *,
    unused: str | None = None,
    fresh: str | None = None,
    original: str | None = None,
) -> None:
    """Loads a checkpoint file into every tensor of `net` but those below `head`; with `keep_head`
    into these too.

    `unused` is a regular expression over names in the file that the model does without, `fresh` one
    over names of the model that the file does without and that stay as they were built; `original`
    says where the file comes from. Raises FileNotFoundError, or ValueError that says which tensors
    differ.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: give weights=FILE (.npz, .pth, .pth.tar or .safetensors)"
            + (f"; the original is {original}" if original else "")
        )
    state = _read(path)
    if any(
        name.startswith("base_encoder.") for name in state
    ):  # MoCo-v3: two encoders, a predictor
        state = {
            name.removeprefix("base_encoder."): tensor
            for name, tensor in state.items()
            if name.startswith("base_encoder.")
        }
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if (
        convert is not None
    ):  # timm's reader of original names; it also resamples position embeddings
        # It fails on the file of another architecture: the comparison below says so, by tensors.
        with contextlib.suppress(KeyError, AttributeError, RuntimeError, AssertionError):
            state = dict(convert(dict(state), net))
    own = net.state_dict()
    skipped = () if keep_head else (head + ".",)
    state = {
        name: tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
        and not name.startswith(skipped)
        and not (unused and re.fullmatch(unused, name))
    }
    wanted = {name for name in own if not name.startswith(skipped)}
    wanted = {name for name in wanted if not (fresh and re.fullmatch(fresh, name))}
    # Files from before PyTorch 0.4.1 have no batch counters, which nothing reads here.
    missing = {name for name in wanted - state.keys() if not name.endswith("num_batches_tracked")}
    wrong = [f"missing {name} {tuple(own[name].shape)}" for name in own if name in missing]
    wrong += [
        f"unexpected {name} {tuple(state[name].shape)}" for name in state if name not in wanted
    ]
    wrong += [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and name in wanted and state[name].shape != own[name].shape
    ]
    if wrong:
        shown = "\n  ".join(
            wrong[:20] + ([f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else [])
        )
        raise ValueError(
            f"{path} holds another model than {type(net).__name__}: "
            f"{len(wrong)} tensors differ\n  {shown}"
        )
    net.load_state_dict(state, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return from_google({name: torch.from_numpy(arrays[name]) for name in arrays.files})
        # Training scripts save their settings beside the weights, Swin's and AS-MLP's as a kind of
        # dict, MAE's as a Namespace; they are never looked at.
        settings = [(OrderedDict, "yacs.config.CfgNode"), argparse.Namespace]
        with torch.serialization.safe_globals(settings):
            return load_state_dict(str(path), weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        LookupError,
        OSError,
        zipfile.BadZipFile,
        SafetensorError,
    ) as error:
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(".: ")
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors ({said}). "
            "Files that would have to be unpickled are refused; save the state dict alone."
        ) from error


def from_google(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ViT in timm's names and layout.

    The archives (google-research/vision_transformer) keep kernels as (in, out), convolutions as
    (h, w, in, out), and attention with an axis of its own for the heads: q, k, v (in, heads, d) and
    out (heads, d, out). `pre_logits`, a layer on top of the representation, is left out: no code
    base that fine-tunes these checkpoints uses it.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in arrays.items():
        if name.endswith("embedding/kernel"):
            tensor = tensor.permute(3, 2, 0, 1)
        elif re.search(r"(query|key|value)/kernel$", name):
            tensor = tensor.flatten(1).T
        elif name.endswith("out/kernel"):
            tensor = tensor.flatten(0, -2).T
        elif name.endswith("/kernel"):
            tensor = tensor.T
        elif name.endswith("/bias"):
            tensor = tensor.flatten()
        for pattern, replacement in GOOGLE:
            name = re.sub(pattern, replacement, name)
        if not name.startswith("pre_logits"):
            state[name] = tensor
    for name in [name for name in state if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in state for part in parts):
            state[name.replace("query", "qkv")] = torch.cat([state.pop(part) for part in parts])
    return state
