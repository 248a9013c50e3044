"""Backbones: sizes as integers, sites that match what they say, image sizes, rates, frozen
statistics, label matching."""

import copy
import functools

import pytest
import torch
from conftest import node
from torch import nn

import peft
from peft.as_mlp import shifted
from peft.backbone import resolve
from peft.config import catalogue

# parameters without the head, and what the sites match; counted from the architectures by hand
SIZES = {
    "alexnet_in1k": (57_003_840, {"conv": 5, "fc1": 1, "fc2": 1}),
    "asmlp_b_in1k": (
        86_727_808,
        {"norm": 4 * 24 + 5, "mixer_conv": 96, "conv": 1 + 6 * 24 + 3, "block": 24, "reduction": 3},
    ),
    "convnext_b_in1k": (
        87_566_464,
        {
            "norm": 1 + 3 + 36 + 1,
            "conv": 1 + 3 + 36,
            "fc1": 36,
            "fc2": 36,
            "block": 36,
            "reduction": 3,
        },
    ),
    "convnext_b_in21k": (
        87_566_464,
        {"norm": 1 + 3 + 36 + 1, "conv": 1 + 3 + 36, "fc1": 36, "fc2": 36, "block": 36, "drop": 36},
    ),
    "dinov2_s14": (22_056_192, {"norm": 25, "qkv": 12, "fc1": 12}),
    "googlenet_in1k": (5_599_904, {"conv": 3 + 9 * 6, "norm": 3 + 9 * 6, "block": 9}),
    "resnet18_in1k": (11_176_512, {"conv": 1 + 16 + 3, "norm": 20, "block": 8}),
    "resnet34_in1k": (21_284_672, {"conv": 1 + 32 + 3, "norm": 36, "block": 16}),
    "resnet50_in1k": (
        23_508_032,
        {"conv": 1 + 48 + 4, "norm": 53, "block_norm": 48, "block": 16, "stage": 4},
    ),
    "swin_b_in21k": (
        86_743_224,
        {
            "norm": 48 + 1 + 3 + 1,
            "block_norm": 48,
            "qkv": 24,
            "proj": 24,
            "fc1": 24,
            "reduction": 3,
            "drop": 48,
        },
    ),
    "swin_b_in21k_ft_in1k": (86_743_224, {"norm": 53, "qkv": 24}),
    "vgg11_in1k": (128_766_336, {"conv": 8, "fc1": 1, "fc2": 1}),
    "vit_b16_augreg_in21k": (85_798_656, {"norm": 25, "qkv": 12}),
    "vit_b16_in1k": (85_798_656, {"norm": 25, "qkv": 12}),
    "vit_b16_in21k": (
        85_798_656,
        {
            "patch": 1,
            "norm": 25,
            "attn": 12,
            "qkv": 12,
            "proj": 12,
            "mlp": 12,
            "fc1": 12,
            "fc2": 12,
            "block": 12,
            "drop": 24,
        },
    ),
    "vit_b16_mae_avg_in1k": (85_798_656, {"norm": 25, "final_norm": 1, "qkv": 12}),
    "vit_b16_mae_in1k": (85_798_656, {"norm": 25, "qkv": 12}),
    "vit_b16_mocov3_in1k": (
        85_798_656 - 151_296,
        {"norm": 25, "qkv": 12},
    ),  # its position embedding is fixed
    "vit_h14_in21k": (630_764_800, {"norm": 65, "qkv": 32}),
    "vit_l16_in21k": (303_301_632, {"norm": 49, "qkv": 24}),
}
ALL = catalogue("backbone")
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
KINDS = {
    "patch": nn.Conv2d,
    "norm": NORMS,
    "block_norm": NORMS,
    "stream_norm": NORMS,
    "final_norm": NORMS,
    "conv": nn.Conv2d,
    "mixer_conv": nn.Conv2d,
    "qkv": nn.Linear,
    "proj": nn.Linear,
    "fc1": (nn.Linear, nn.Conv2d),
    "fc2": (nn.Linear, nn.Conv2d),
    "reduction": (nn.Linear, nn.Conv2d),
    "drop": nn.Dropout,
    "head": nn.Linear,
}


@functools.cache
def on_meta(backbone: str, method: str = "linear", num_classes: int = 10) -> nn.Module:
    with torch.device("meta"):
        return peft.create(backbone, method, num_classes=num_classes)


def test_every_full_size_backbone_has_its_size_here():
    full = [name for name in ALL if not name.startswith("tiny_")]
    assert sorted(SIZES) == full, "a new backbone goes into SIZES: its parameters and its sites"


@pytest.mark.parametrize("backbone", SIZES)
def test_size_and_sites(backbone):
    model, (parameters, sites) = on_meta(backbone), SIZES[backbone]
    assert peft.count(model)["backbone"] == parameters
    assert {site: len(resolve(model, [site])) for site in sites} == sites


@pytest.mark.parametrize("backbone", ALL)
def test_sites_hold_the_right_kind_of_module(backbone):
    model = on_meta(backbone)
    for site in model.sites:
        for path, module in resolve(model, [site]).items():
            assert isinstance(getattr(module, "base", module), KINDS.get(site, nn.Module)), (
                f"{site}: {path}"
            )
    modules = {
        path: getattr(m, "base", m) for path, m in model.named_modules() if ".base" not in path
    }
    every = {path for path, m in modules.items() if isinstance(m, nn.Conv2d)}
    mlp = {
        path
        for path in every
        for site in ("fc1", "fc2")
        if site in model.sites and path in resolve(model, [site])
    }
    assert set(resolve(model, ["conv"])) | mlp == every
    if "norm" in model.sites:
        assert set(resolve(model, ["norm"])) == {
            path for path, m in modules.items() if isinstance(m, NORMS)
        }
    if "block" in model.sites:
        blocks = set(resolve(model, ["block"]))
        assert not any(a != b and a.startswith(b + ".") for a in blocks for b in blocks), (
            "blocks do not hold each other"
        )
    head = model.get_submodule(model.sites["head"].replace("\\", ""))
    assert head.out_features == 10
    assert list(model.state_dict())[-1].startswith(model.sites["head"].replace("\\", ""))


@pytest.mark.parametrize("backbone", ALL)
def test_a_yaml_names_its_checkpoint(backbone):
    yaml = node("backbone", backbone)
    assert yaml.name == backbone
    assert len(yaml.mean) == len(yaml.std) == 3
    assert yaml.image_size >= (yaml.get("smallest") or 1)
    if yaml.get("pretrained", True) and backbone != "dinov2_s14":
        assert yaml.original.startswith("https://")


S1 = 2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024  # widths summed over Swin-B's blocks
COUNTS = [
    ("vit_b16_in21k", "bitfit", 102_912),
    ("vit_l16_in21k", "bitfit", 272_384),
    ("vit_h14_in21k", "bitfit", 453_120),
    ("swin_b_in21k", "bitfit", 200_760),  # with the relative position bias tables
    ("convnext_b_in21k", "bitfit", 130_304),
    ("convnext_b_in1k", "bitfit", 130_304),
    ("vit_b16_in21k", "ssf", 205_824),
    ("vit_l16_in21k", "ssf", 544_768),
    ("vit_h14_in21k", "ssf", 906_240),
    ("swin_b_in21k", "ssf", 22 * S1 + 2 * 4 * (128 + 256 + 512) + 2 * 1024 + 2 * 2 * 128),
    ("asmlp_b_in1k", "ssf", 274_432),
    ("convnext_b_in21k", "ssf", 260_608),
    ("convnext_b_in1k", "ssf", 260_608),
    ("vit_b16_in21k", "lora", 294_912),
    ("swin_b_in21k", "lora", 2 * 8 * 2 * S1),
    ("vit_b16_mae_in1k", "full", 85_798_656),
    ("vit_b16_mocov3_in1k", "full", 85_647_360),
    ("resnet18_in1k", "full", 11_227_812 - 51_300),
    ("resnet50_in1k", "full", 23_712_932 - 204_900),
]


@pytest.mark.parametrize(("backbone", "method", "tuned"), COUNTS)
def test_published_counts(backbone, method, tuned):
    assert peft.count(on_meta(backbone, method))["tuned"] == tuned


def test_bitfit_on_swin_is_the_published_quarter_million():
    """0.25 M with the head averaged over VTAB's 19 tasks, 940 classes in all."""
    assert (
        peft.count(on_meta("swin_b_in21k", "bitfit"))["tuned"] + round((1024 + 1) * 940 / 19)
        == 251_471
    )


FIVE = ("full", "linear", "bitfit", "lora", "ssf")
ONE_EACH = (
    "swin_b_in21k",
    "asmlp_b_in1k",
    "convnext_b_in1k",
    "resnet50_in1k",
    "googlenet_in1k",
    "alexnet_in1k",
)


@pytest.mark.parametrize("method", FIVE)
@pytest.mark.parametrize("backbone", ONE_EACH)
def test_the_basic_methods_apply_to_every_family(backbone, method):
    counts = peft.count(on_meta(backbone, method))
    assert counts["head"] > 0
    assert (counts["tuned"] > 0) == (method != "linear")


@pytest.mark.parametrize("backbone", ["googlenet_in1k", "tiny_resnet"])
def test_frozen_batch_norms_stay_still(backbone):
    model = peft.create(backbone, "linear", num_classes=3, image_size=64).train()
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 3, 64, 64)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    "backbone", ["tiny_swin", "tiny_asmlp", "tiny_convnext", "tiny_resnet", "tiny_vit"]
)
def test_drop_path_is_what_was_asked(backbone):
    def rates(**given) -> list[float]:
        model = peft.create(backbone, num_classes=3, **given)
        return [
            m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath" and m.drop_prob
        ]

    assert rates() == []
    asked = rates(drop_path=0.3)
    assert asked == sorted(asked)
    assert max(asked) == pytest.approx(0.3)


def test_factories_defaults_are_overruled():
    """Untold, torchvision's ConvNeXt-B drops half of its last branch and timm's Swin a tenth."""
    assert not any(
        m.p for m in on_meta("convnext_b_in1k").modules() if type(m).__name__ == "StochasticDepth"
    )
    assert not any(type(m).__name__ == "DropPath" for m in on_meta("swin_b_in21k").modules())
    with pytest.raises(ValueError, match="no residual branches"):
        peft.create("tiny_vgg", num_classes=3, drop_path=0.1)


@pytest.mark.parametrize("backbone", ["tiny_swin", "tiny_vit", "tiny_convnext"])
def test_layer_dropout_grows_over_the_depth(backbone):
    model = peft.create(backbone, num_classes=3, layer_dropout=0.4)
    p = [drop.p for drop in resolve(model, ["drop"]).values()]
    assert p == sorted(p)
    assert (p[0], p[-1]) == (0.0, pytest.approx(0.4))


@pytest.mark.parametrize(
    ("backbone", "sizes"),
    [
        ("tiny_vit", (32, 64)),
        (
            "tiny_swin",
            (32, 56, 72),
        ),  # windows of 4 on grids of 8, 14 and 18: the last two are padded
        ("tiny_asmlp", (32, 56)),
        ("tiny_convnext", (32, 56)),
        ("tiny_resnet", (32, 57)),
        ("tiny_vgg", (32, 57)),
        ("googlenet_in1k", (32, 57)),
    ],
)
def test_other_image_sizes_work(backbone, sizes):
    for size in sizes:
        model = peft.create(backbone, num_classes=3, image_size=size).eval()
        assert model(torch.randn(2, 3, size, size)).shape == (2, 3)


@pytest.mark.parametrize(
    ("backbone", "size", "nearest"),
    [
        ("vit_b16_in21k", 100, "96 and 112"),
        ("swin_b_in21k", 192, "multiples of 32 from 224 on; the nearest are 224 and 256"),
        ("swin_b_in21k", 250, "the nearest are 224 and 256"),
        ("asmlp_b_in1k", 32, "multiples of 32 from 64 on; the nearest are 64 and 96"),
        ("alexnet_in1k", 60, "63 or more"),
    ],
)
def test_an_image_size_that_does_not_fit_says_what_does(backbone, size, nearest):
    with pytest.raises(ValueError, match=nearest):
        peft.create(backbone, num_classes=3, image_size=size)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("size", [(6, 5), (2, 2)])
def test_axial_shift(dim, size):
    """Channel group g of 5 reads from g - 2 places before it; zeros come in. Place by place."""
    x = torch.randn(2, 8, *size)
    expected = torch.zeros_like(x)
    for c in range(8):
        step = c // 2 - 2  # groups of ceil(8 / 5) channels
        for h in range(size[0]):
            for w in range(size[1]):
                source = (h - step, w) if dim == 2 else (h, w - step)
                if 0 <= source[0] < size[0] and 0 <= source[1] < size[1]:
                    expected[:, c, h, w] = x[:, c, source[0], source[1]]
    assert torch.equal(shifted(x, 5, dim), expected)


def test_a_kept_head_needs_one_row_a_class():
    for keep, num_classes in ([1, 2, 2], 3), ([1, 2], 3), ([1, 2, 1000], 3), ("auto", 3):
        with (
            pytest.raises(ValueError, match=r"head.keep=.* must name 3 different rows of 0..999"),
            torch.device("meta"),
        ):
            peft.create("resnet18_in1k", num_classes=num_classes, **{"backbone.head.keep": keep})
