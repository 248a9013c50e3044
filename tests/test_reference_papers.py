"""The four papers' methods in every form: gradients, merging, compiling, copies and vmap on a whole
network, and the published counts as integers.
"""

import copy
import warnings

import pytest
import torch
import torchvision
from conftest import jitter, tiny
from reference.cases import EXACT, vit
from torch import nn
from torch.testing import assert_close

import peft
from peft.lava import LAVA

VARIANTS = [
    ("rlrr", {"rank": 4}),
    ("rlrr", {"sides": "left", "init": "zero"}),
    ("rlrr", {"sides": "right", "init": "normal"}),
    ("rlrr", {"residual": False, "init": "one"}),
    ("rlrr", {"times_weight": False}),
    ("rlrr", {"mha": False, "layers": 2}),
    ("rlrr", {"ffn": False, "norm": False, "layers": [0, 2]}),
    ("alore", {"experts": 2, "rank": 8, "scale_init": "normal"}),
    ("alore", {"sites": ["proj", "fc2"], "position": "sequential_after", "layers": 2}),
    ("alore_stacked_linear", {"sites": ["fc2"], "position": "sequential_after"}),
    ("alore_stacked_nonlinear", {}),
    ("lava", {"ortho": "both", "rank": 3}),
    ("lava", {"ortho": "v", "strength": 0.0}),
    ("superlora", {"groups": 4, "form": "tucker", "order": 3, "rank": 4}),
    ("superlora", {"groups": "layer", "reshape": False, "rank": 4}),
    ("superlora", {"form": "kron", "splits": 3, "factor": 6, "rank": 2}),
    ("superlora", {"form": "dense", "groups": 6}),
    ("superlora_projected", {"projection": "nonlinear_v2", "form": "cp", "order": 4, "rank": 8}),
    ("superlora_projected", {"projection": "shuffle", "ratio": 1.0, "groups": 4}),
]
variants = pytest.mark.parametrize(("method", "options"), VARIANTS)


@pytest.fixture
def model(method: str, options: dict) -> nn.Module:
    """A tiny ViT of three blocks with every trainable tensor moved off its start."""
    return jitter(tiny("tiny_vit", method, model=vit(64, 3), **options)).eval()


@variants
def test_every_tensor_gets_a_gradient(model, images):
    loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1])) + peft.penalty(model)
    loss.backward()
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == parameter.requires_grad, name


@variants
def test_a_variant_merges(model, images):
    expected = model(images)
    if any(getattr(tuner, "activation", None) for tuner in peft.tuners(model).values()):
        with pytest.raises(TypeError, match=r"blocks\.0.* is not linear"):
            peft.merge(model)
        return
    scale = max(1, expected.abs().max().item())
    assert_close(peft.merge(model)(images), expected, atol=1e-5 * scale, rtol=0)
    model, images = model.double(), images.double()
    assert_close(peft.merge(model)(images), model(images), **EXACT)


COMPILED = [
    ("rlrr", {"rank": 4}),
    ("rlrr", {"sides": "left", "init": "zero"}),
    ("alore", {"sites": ["proj", "fc2"], "position": "sequential_after"}),
    ("superlora", {"groups": 4, "form": "tucker", "order": 3, "rank": 4}),
    ("superlora", {"form": "kron", "splits": 3, "factor": 6, "rank": 2}),
]  # whose code no method yaml's default runs


@pytest.mark.parametrize(("method", "options"), COMPILED)
def test_a_variant_compiles_and_copies(model, images):
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert_close(compiled(images), model(images), atol=1e-4, rtol=1e-4)


@variants
def test_a_variant_runs_under_vmap(model, images):
    """Two adapters over one frozen backbone: stacked tensors must give what each gives alone."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    other = {name: t + 0.01 * torch.ones_like(t) for name, t in state.items()}
    both = {name: torch.stack([t, other[name]]) for name, t in state.items()}

    def outputs(state: dict) -> torch.Tensor:
        return torch.func.functional_call(model, state, (images,))

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "There is a performance drop"
        )  # attention has no batch rule
        together = torch.vmap(outputs)(both)
    assert_close(together, torch.stack([outputs(state), outputs(other)]), atol=1e-4, rtol=1e-4)


def counted(method: str, backbone: str = "tiny_vit", **options) -> int:
    with torch.device("meta"):
        return peft.count(peft.create(backbone, method, num_classes=1, **options))["tuned"]


BASE, LARGE, HUGE = vit(768, 12), vit(1024, 24), vit(1280, 32)  # ViT-B, ViT-L, ViT-H


@pytest.mark.parametrize(
    ("method", "model", "options", "expected"),
    [
        ("rlrr", BASE, {}, 288_768),  # Table 2: 0.33 with the mean VTAB-1k head, 38,045
        ("rlrr", LARGE, {}, 765_952),  # Table 4: 0.82 with the head
        ("rlrr", HUGE, {}, 1_274_880),
        (
            "rlrr",
            BASE,
            {"sides": "left"},
            205_824,
        ),  # Table 6: 0.39 with the mean FGVC head, 180,407
        ("rlrr", BASE, {"sides": "right", "residual": False, "init": "one"}, 205_824),
        ("rlrr", BASE, {"residual": False, "init": "one"}, 288_768),  # Table 6: 0.47
        ("rlrr", BASE, {"times_weight": False}, 288_768),  # Table 11
        ("alore", BASE, {}, 147_520),  # Table 2: 0.15, as all of ALoRE's counts without the head
        ("alore_attn", BASE, {}, 73_792),
        ("alore", LARGE, {}, 393_280),  # Table 3
        ("alore", HUGE, {}, 655_424),
        ("alore", BASE, {"rank": 1}, 36_928),  # Table 6a
        ("alore", BASE, {"rank": 32}, 1_179_712),
        ("alore", BASE, {"experts": 1}, 147_457),  # Table 6b
        ("alore", BASE, {"experts": 16}, 151_552),
        ("alore", BASE, {"experts": 32}, 180_224),
        ("alore", BASE, {"sites": ["fc1"]}, 73_792),  # Table 6c
        ("alore", BASE, {"sites": ["proj", "fc2"], "position": "sequential_after"}, 147_520),
        ("alore", BASE, {"layers": 2}, 24_640),  # Table 6d
        ("alore", BASE, {"layers": 10}, 122_944),
        ("alore_stacked_linear", BASE, {}, 663_936),  # Table 4
        ("alore_stacked_nonlinear", BASE, {}, 663_936),
        (
            "lava",
            BASE,
            {},
            294_912,
        ),  # Table 2: 0.3 on RoBERTa-base, of the same width and depth
    ],
)
def test_published_counts(method, model, options, expected):
    assert counted(method, model=model, **options) == expected


@pytest.mark.parametrize(
    ("network", "rank", "expected"),
    [("18", 1, 23_509), ("50", 1, 64_597), ("18", 10, 235_090), ("50", 10, 645_970)],
)
def test_published_counts_of_rlrr_on_resnets(network, rank, expected):
    """Table 12: 0.29, 0.27 and 0.85 with a head of 100 classes; its 0.08 of ResNet-18 at rank 1
    would need the affine of the batch norms as well."""
    model = {"_target_": "timm.create_model", "_partial_": True, "model_name": f"resnet{network}"}
    sites = {"conv": r"conv1|layer\d\.\d+\.(conv\d|downsample\.0)", "head": "fc"}
    assert counted("rlrr", "tiny_resnet", rank=rank, model=model, sites=sites) == expected


@pytest.mark.parametrize(
    ("network", "reshaped", "expected"),
    [
        ("alexnet", True, 72_779),
        ("alexnet", False, 47_273),
        ("vgg11", True, 109_787),
        ("vgg11", False, 56_099),
        ("resnet34", True, 224_259),
        ("resnet34", False, 53_967),
        ("googlenet", True, 130_067),
        ("googlenet", False, 93_377),
        ("resnet18", True, 112_899),
        ("resnet18", False, 31_407),
        ("convnext_base", True, 2_734_106),
        ("convnext_base", False, 128_567),
    ],
)
def test_published_counts_of_lava_on_convolutions(network, reshaped, expected):
    """Tables 1 and 5, as shares of the whole model: torchvision's networks at rank 3 with a head of
    ten classes; depthwise kernels are counted with all input channels."""
    extra = {"aux_logits": False, "init_weights": False} if network == "googlenet" else {}
    with torch.device("meta"):
        net = getattr(torchvision.models, network)(num_classes=10, **extra)
        convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        tuners = [LAVA(conv, rank=3, reshaped=reshaped) for conv in convolutions]
    head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    added = sum(p.numel() for t in tuners for n, p in t.named_parameters() if n[:4] != "base")
    assert added + sum(p.numel() for p in head.parameters()) == expected
