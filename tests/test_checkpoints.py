"""Checkpoint files in every original format: values land in the right tensors, a wrong file says
which differ: `test_checkpoints_refused`.

Each file is written here in its authors' names and layout, with the reverse mapping stated from
their code, never from ours.
"""

import argparse
import re
import sys
import types
from functools import partial

import numpy as np
import pytest
import timm
import torch
from conftest import tiny
from safetensors.torch import save_file
from torch import Tensor, nn

import peft
from peft.backbone import build_backbone
from peft.config import compose
from peft.state import digest

HEAD = ("head.", "fc.", "classifier.6.")


def seeded(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=seeded.generator)


seeded.generator = torch.Generator().manual_seed(7)


def random_state(backbone: str, **overrides) -> dict[str, Tensor]:
    """Random tensors under the model's own names; counters and index buffers as they are."""
    state = peft.create(backbone, num_classes=7, **overrides).state_dict()
    return {
        name.replace(".base", ""): seeded(t.shape) if t.is_floating_point() else t.clone()
        for name, t in state.items()
    }


def backbone_of(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    head = model.sites["head"].replace("\\", "") + "."
    return {name: t for name, t in state.items() if not name.startswith(head)}


def loaded(backbone: str, path, **overrides) -> dict[str, Tensor]:
    """The tensors of a model after loading, without its head of 3 classes, which must be fresh."""
    model = peft.create(backbone, num_classes=3, weights=str(path), **overrides)
    assert not any(
        p.any() for p in model.get_submodule(model.sites["head"].replace("\\", "")).parameters()
    )
    return backbone_of(
        {name.replace(".base", ""): t for name, t in model.state_dict().items()}, model
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def google(
    depth: int,
    width: int = 64,
    heads: int = 2,
    prefix: str = "",
    classes: int = 7,
    grid: int = 10,
    pre_logits: bool = True,
):
    """A random ViT archive as google-research/vision_transformer's, for timm's test_vit."""
    d, h = width, 4 * width
    shapes = {
        "cls": (1, 1, d),
        "embedding/kernel": (16, 16, 3, d),
        "embedding/bias": (d,),
        "Transformer/posembed_input/pos_embedding": (1, grid * grid + 1, d),
        "Transformer/encoder_norm/scale": (d,),
        "Transformer/encoder_norm/bias": (d,),
        "head/kernel": (d, classes),
        "head/bias": (classes,),
    }
    if pre_logits:
        shapes |= {"pre_logits/kernel": (d, d), "pre_logits/bias": (d,)}
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (d,), f"{block}/{norm}/bias": (d,)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes |= {
                f"{attention}/{part}/kernel": (d, heads, d // heads),
                f"{attention}/{part}/bias": (heads, d // heads),
            }
        shapes |= {f"{attention}/out/kernel": (heads, d // heads, d), f"{attention}/out/bias": (d,)}
        shapes |= {
            f"{block}/MlpBlock_3/Dense_0/kernel": (d, h),
            f"{block}/MlpBlock_3/Dense_0/bias": (h,),
        }
        shapes |= {
            f"{block}/MlpBlock_3/Dense_1/kernel": (h, d),
            f"{block}/MlpBlock_3/Dense_1/bias": (d,),
        }
    return {prefix + name: seeded(shape).numpy() for name, shape in shapes.items()}


TWO = {"backbone.model.depth": 2}


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_google_npz(tmp_path, prefix):
    arrays = google(2, prefix=prefix)
    np.savez(tmp_path / "vit.npz", **arrays)
    ours = loaded("tiny_vit", tmp_path / "vit.npz", **TWO)
    part = arrays[f"{prefix}Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"]
    for head in range(2):  # k's rows follow q's; each head owns 32 of them
        rows = ours["blocks.1.attn.qkv.weight"][64 + 32 * head : 64 + 32 * (head + 1)]
        assert torch.equal(rows, torch.from_numpy(part[:, head]).T)
    theirs = timm.create_model("test_vit", depth=2, mlp_ratio=4, num_classes=7)
    theirs.load_pretrained(str(tmp_path / "vit.npz"))  # timm's own reader
    same(ours, {name: t for name, t in theirs.state_dict().items() if not name.startswith("head.")})


def test_google_npz_of_another_model_names_the_tensors(tmp_path):
    np.savez(tmp_path / "deep.npz", **google(3))
    with pytest.raises(
        ValueError,
        match=r"(?s)deep.npz holds another model .*: 12 tensors.*unexpected blocks\.2\.",
    ):
        loaded("tiny_vit", tmp_path / "deep.npz", **TWO)
    np.savez(tmp_path / "wide.npz", **google(2, width=128))
    with pytest.raises(
        ValueError,
        match=r"blocks\.0\.attn\.proj\.weight is \(128, 128\) in the file, \(64, 64\) in the model",
    ):
        loaded("tiny_vit", tmp_path / "wide.npz", **TWO)


def test_position_embeddings_of_another_grid_are_resampled(tmp_path):
    np.savez(tmp_path / "vit.npz", **google(2, grid=7))
    state = loaded("tiny_vit", tmp_path / "vit.npz", **TWO)
    assert state["pos_embed"].shape == (1, 101, 64)


def test_mae_pth(tmp_path):
    state = random_state("tiny_vit")
    file = {
        name: t for name, t in state.items() if not name.startswith(HEAD)
    }  # the released encoder has no head
    torch.save(
        {"model": file, "args": argparse.Namespace(lr=0.1), "epoch": 3}, tmp_path / "mae.pth"
    )
    same(loaded("tiny_vit", tmp_path / "mae.pth"), file)


def test_mae_read_by_its_mean_leaves_the_files_norm(tmp_path):
    yaml = compose("train", ["backbone=vit_b16_mae_avg_in1k"]).backbone
    tiny = partial(timm.create_model, "test_vit", depth=1)
    file = {n: torch.randn_like(t) for n, t in tiny().state_dict().items() if "head" not in n}
    torch.save({"model": file}, tmp_path / "mae.pth")
    model = build_backbone(
        partial(tiny, global_pool=yaml.model.global_pool),
        {"head": "head"},
        num_classes=3,
        pretrained=True,
        weights=tmp_path / "mae.pth",
        **{key: yaml[key] for key in ("unused", "fresh")},
    )
    state = {n: t for n, t in model.state_dict().items() if "head" not in n}
    assert torch.equal(state.pop("fc_norm.weight"), torch.ones(64))
    assert not state.pop("fc_norm.bias").any()
    same(state, {name: t for name, t in file.items() if not name.startswith("norm.")})


def test_moco_pretraining_and_linear_pth_tar(tmp_path):
    state = random_state("tiny_vit")
    encoder = {name: t for name, t in state.items() if not name.startswith(HEAD)}
    file = {f"module.base_encoder.{name}": t for name, t in encoder.items()}
    file |= {f"module.momentum_encoder.{name}": torch.zeros_like(t) for name, t in encoder.items()}
    file |= {
        f"module.{which}.head.{i}.weight": seeded((5, 5))
        for which in ("base_encoder", "momentum_encoder")
        for i in (0, 3)
    }
    file |= {"module.predictor.0.weight": seeded((4, 4))}
    torch.save(
        {
            "epoch": 300,
            "arch": "vit_base",
            "state_dict": file,
            "optimizer": {"state": {}},
            "scaler": {},
        },
        tmp_path / "vit.pth.tar",
    )
    fixed = {"fixed": ["pos_embed"]}
    same(loaded("tiny_vit", tmp_path / "vit.pth.tar", **fixed), encoder)

    file = {f"module.{name}": t for name, t in state.items()}
    whole = {
        "epoch": 90,
        "arch": "vit_base",
        "state_dict": file,
        "best_acc1": torch.tensor(76.7),
        "optimizer": {},
    }
    torch.save(whole, tmp_path / "linear.pth.tar", _use_new_zipfile_serialization=False)
    same(loaded("tiny_vit", tmp_path / "linear.pth.tar", **fixed), encoder)


def test_a_fixed_position_embedding_is_no_parameter(tmp_path, images):
    state = random_state("tiny_vit")
    torch.save({"state_dict": state}, tmp_path / "vit.pth.tar")
    model = peft.create(
        "tiny_vit",
        "full",
        num_classes=3,
        weights=str(tmp_path / "vit.pth.tar"),
        fixed=["pos_embed"],
    )
    assert torch.equal(dict(model.named_buffers())["pos_embed"], state["pos_embed"])
    assert not any("pos_embed" in name for name, _ in model.named_parameters())
    free = peft.create("tiny_vit", "full", num_classes=3, weights=str(tmp_path / "vit.pth.tar"))
    assert peft.count(free)["tuned"] - peft.count(model)["tuned"] == state["pos_embed"].numel()
    assert digest(free) == digest(model)
    model.load_state_dict(free.state_dict())
    with torch.no_grad():
        for net in (free, model):
            net.head.weight.fill_(0.1)
    assert torch.equal(free.eval()(images), model.eval()(images))


@pytest.fixture
def settings(monkeypatch):
    """A yacs CfgNode as the training scripts of Swin and AS-MLP save it, without yacs."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    node = module.CfgNode(MODEL=module.CfgNode(NAME="swin", DEPTHS=[2, 2], DROP=0.1))
    node.__dict__["__immutable__"] = True
    return node


def test_swin_pth(tmp_path, settings, monkeypatch):
    state = random_state("tiny_swin")
    file = {}
    for name, t in state.items():
        if name.startswith(
            "layers.1.downsample"
        ):  # the original merges at the end of a stage, timm at the start of the next
            name = name.replace("layers.1", "layers.0")
        file[name.replace("head.fc.", "head.")] = t
    file["layers.0.blocks.0.attn.relative_position_index"] = torch.arange(4)
    file["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    torch.save({"model": file, "config": settings}, tmp_path / "swin.pth")
    monkeypatch.undo()
    assert "yacs" not in sys.modules
    same(
        loaded("tiny_swin", tmp_path / "swin.pth"),
        {name: t for name, t in state.items() if not name.startswith("head.")},
    )
    larger = loaded("tiny_swin", tmp_path / "swin.pth", image_size=88)
    same(larger, loaded("tiny_swin", tmp_path / "swin.pth"))  # no tensor depends on the image size


def test_convnext_pth(tmp_path):
    state = random_state("tiny_convnext")
    file = {}
    for name, t in state.items():
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        file[name.replace("head.norm", "norm").replace("head.fc", "head")] = t
    torch.save({"model": file}, tmp_path / "convnext.pth")
    same(
        loaded("tiny_convnext", tmp_path / "convnext.pth"),
        {name: t for name, t in state.items() if not name.startswith("head.fc.")},
    )


def test_torchvision_pth(tmp_path):
    """GoogLeNet's file holds the auxiliary classifiers; old files hold no batch counters."""
    state = random_state("googlenet_in1k")
    file = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    file |= {
        f"aux{i}.{leaf}": seeded((3, 3))
        for i in (1, 2)
        for leaf in ("conv.conv.weight", "conv.bn.running_mean", "fc1.weight", "fc2.bias")
    }
    torch.save(file, tmp_path / "googlenet.pth", _use_new_zipfile_serialization=False)
    same(
        loaded("googlenet_in1k", tmp_path / "googlenet.pth"),
        {name: t for name, t in state.items() if not name.startswith("fc.")},
    )


@pytest.mark.parametrize(
    "backbone", ["tiny_vit", "tiny_swin", "tiny_convnext", "tiny_resnet", "tiny_vgg", "tiny_asmlp"]
)
def test_timm_safetensors_and_our_own_state(tmp_path, backbone):
    state = random_state(backbone)
    save_file(state, tmp_path / "model.safetensors")
    model = peft.create(backbone, num_classes=7)
    same(loaded(backbone, tmp_path / "model.safetensors"), backbone_of(state, model))


def test_as_mlp_pth(tmp_path, settings):
    """Names as in svip-lab/AS-MLP."""
    state = random_state("tiny_asmlp")
    block = [
        f"axial_shift.{layer}.{leaf}"
        for layer in ("conv1", "conv2_1", "conv2_2", "conv3", "norm1", "norm2")
        for leaf in ("weight", "bias")
    ]
    block += [
        f"{layer}.{leaf}"
        for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
        for leaf in ("weight", "bias")
    ]
    names = {f"layers.{s}.blocks.{b}.{leaf}" for s in (0, 1) for b in (0, 1) for leaf in block}
    names |= {
        "layers.0.downsample.reduction.weight",
        "layers.0.downsample.norm.weight",
        "layers.0.downsample.norm.bias",
    }
    names |= {
        f"{layer}.{leaf}"
        for layer in ("patch_embed.proj", "patch_embed.norm", "norm", "head")
        for leaf in ("weight", "bias")
    }
    assert state.keys() == names
    assert state["layers.0.downsample.reduction.weight"].shape == (64, 128, 1, 1)
    torch.save(
        {"model": state, "config": settings, "epoch": 299, "max_accuracy": 83.3},
        tmp_path / "asmlp.pth",
    )
    same(
        loaded("tiny_asmlp", tmp_path / "asmlp.pth"),
        {name: t for name, t in state.items() if not name.startswith("head.")},
    )


def test_the_digest_leaves_out_what_a_tuner_keeps():
    """Its parameters and its buffers: one checkpoint has one name, whatever method starts there."""
    model = tiny("tiny_vit", "lora")
    before = digest(model)
    for tuner in peft.tuners(model).values():
        tuner.register_buffer("places", torch.arange(3))
    assert digest(model) == before
    next(iter(peft.tuners(model).values())).base.register_buffer("scale", torch.ones(1))
    assert digest(model) != before


def test_the_digest_does_not_depend_on_the_format(tmp_path):
    arrays = google(2)
    np.savez(tmp_path / "vit.npz", **arrays)
    first = peft.create("tiny_vit", num_classes=3, weights=str(tmp_path / "vit.npz"), **TWO)
    save_file(
        {name: t.contiguous() for name, t in first.state_dict().items()},
        tmp_path / "vit.safetensors",
    )
    second = peft.create(
        "tiny_vit", num_classes=9, weights=str(tmp_path / "vit.safetensors"), **TWO
    )
    assert digest(first) == digest(second)


def test_a_kept_head_gives_the_checkpoints_logits(tmp_path, images):
    """head.keep cuts the checkpoint's own classifier down to the rows that stand for classes."""
    arrays = google(2)
    np.savez(tmp_path / "vit.npz", **arrays)
    options = dict(weights=str(tmp_path / "vit.npz"), **TWO)
    head = {"backbone.head": {"classes": 7, "keep": list(range(7))}}
    whole = peft.create("tiny_vit", num_classes=7, **options, **head).eval()
    assert torch.equal(whole.head.weight, torch.from_numpy(arrays["head/kernel"]).T)
    kept = peft.create(
        "tiny_vit",
        "lora",
        num_classes=3,
        **options,
        **{"backbone.head": {"classes": 7, "keep": [4, 0, 6]}, "trainable": []},
    )
    torch.testing.assert_close(kept.eval()(images), whole(images)[:, [4, 0, 6]])
    assert peft.count(kept)["head"] == 0, "with trainable=[] the head is frozen"
    assert peft.count(kept)["tuned"] > 0
