"""Every yaml composes, and everything it names exists."""

import inspect
from functools import partial

import pytest
import timm
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

import peft
from data.transforms import Preset
from peft.config import catalogue, compose, placements_of, plain
from peft.lora import LoRA

GROUPS = ["backbone", "dataset", "method", "optim", "preset", "protocol", "logger"]
ENTRIES = [(group, name) for group in GROUPS for name in catalogue(group)]


def targets(node):
    """Every `_target_` below a node, with its arguments."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node["_target_"], set(node) - {"_target_", "_partial_", "_args_"}
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, ListConfig):
        for value in node:
            yield from targets(value)


@pytest.mark.parametrize(("group", "name"), ENTRIES)
def test_every_yaml_composes_and_names_what_exists(group, name):
    cfg = compose("train", [f"{group}={name}"])
    OmegaConf.to_container(cfg, resolve=True)
    if group != "protocol":
        assert cfg[group].name == name.rpartition("/")[2], "a yaml's name is that of its file"
    for target, arguments in targets(cfg[group]):
        function = get_object(target)
        accepted = inspect.signature(function).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        assert open_ended or arguments <= set(accepted), (
            f"{target} takes no {arguments - set(accepted)}"
        )
    if group == "preset":
        Preset(**plain(cfg.preset))


@pytest.mark.parametrize("name", catalogue("method"))
def test_a_method_says_where_it_comes_from_and_what_it_counts(name):
    method = compose("train", [f"method={name}"]).method
    assert {"name", "paper", "placements", "trainable", "formula"} <= set(method)
    for family in compose("train", [f"method={name}"]).method.get("excludes") or {}:
        with pytest.raises(ValueError, match="does not apply"):
            placements_of(method, family)


@pytest.mark.parametrize("name", catalogue("dataset"))
def test_a_dataset_brings_the_protocol_of_its_suite(name):
    """VTAB-1k is not trained for 4 epochs at 56 pixels because nobody named a protocol."""
    suite = name.partition("/")[0]
    usual = {"mini": "mini", "fake": "mini", "folder": "fgvc_honest"}.get(suite, f"{suite}_honest")
    cfg = compose("train", [f"dataset={name}"])
    if suite not in {"mini", "fake", "folder", "vtab", "fgvc", "cifar"}:
        return  # a suite of somebody's own has what protocol it likes
    assert cfg.protocol.name == usual and cfg.image_size == (56 if usual == "mini" else 224)
    if usual != "mini":
        peek = usual.replace("honest", "peek")
        told = compose("train", [f"dataset={name}", f"protocol={peek}", "preset=vtab_none"])
        assert told.protocol.selection == "best_on_test" and told.preset.name == "vtab_none"


def test_every_sweep_composes():
    for name in catalogue("sweep"):
        assert compose("sweep", [f"sweep={name}"]).sweep.name == name.rpartition("/")[2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tiny_vt", "rlrr", {}), "no backbone 'tiny_vt'; did you mean tiny_vit"),
        (("tiny_vit", "rlr", {}), "no method 'rlr'; did you mean rlrr"),
        (("tiny_vit", "lora", {"rnk": 2}), "no key 'rnk'; did you mean rank"),
        (("tiny_vit", "lora", {"rank": 65}), "blocks.0.attn.qkv: rank=65 must lie in 1..64"),
        (("tiny_vit", "lora", {"image_size": 50}), "nearest are 48 and 64"),
    ],
)
def test_create_names_what_is_near(names, message):
    backbone, method, overrides = names
    with pytest.raises(ValueError, match=message):
        peft.create(backbone, method, num_classes=3, **overrides)


def test_attach_checks_before_it_touches():
    model = peft.create("tiny_vit", "linear", num_classes=3)
    keys = set(model.state_dict())
    model.sites["gone"] = r"blocks\.\d+\.attn\.qvk"
    for placements, message in [
        ([{"sites": ["qvk"], "tuner": LoRA.over}], "no site 'qvk'; did you mean qkv"),
        (
            [{"sites": ["qkv"], "tuner": LoRA.over}, {"sites": ["gone"], "tuner": LoRA.over}],
            r"matches site 'gone'.*closest: blocks.0.attn.qkv",
        ),
        (
            [{"sites": ["qkv"], "tuner": LoRA.over}, {"sites": ["qkv"], "tuner": LoRA.over}],
            "name their tensors alike",
        ),
        ([{"sites": ["qkv"], "tuner": LoRA.over, "layers": 7}], "layers=7 does not fit 6 blocks"),
        ([{"sites": ["qkv"], "tuners": LoRA.over}], "keys sites, tuner and layers, not tuners"),
    ]:
        with pytest.raises(ValueError, match=message):
            peft.attach(model, placements)
    with pytest.raises(ValueError, match="nothing would train"):
        peft.attach(model, [], [])
    with pytest.raises(ValueError, match="neither a site nor matches a parameter"):
        peft.attach(model, [], ["heda"])
    assert set(model.state_dict()) == keys and not peft.tuners(model)
    peft.attach(model, [{"sites": ["qkv"], "tuner": LoRA.over, "layers": [1, 3]}])
    assert list(peft.tuners(model)) == ["blocks.1.attn.qkv", "blocks.3.attn.qkv"]
    with pytest.raises(ValueError, match="already carries tuners"):
        peft.attach(model)


def test_a_network_of_ones_own_says_where_its_sites_are():
    model = timm.create_model("test_resnet", num_classes=5)
    with pytest.raises(ValueError, match=r"this ResNet does not say where its sites are"):
        peft.attach(model)
    model.sites = {"head": "fc", "conv": r"layer\d\..*conv\d"}
    with pytest.raises(ValueError, match=r"takes all of its sites: LoRA\.over"):
        peft.attach(model, [{"sites": ["conv"], "tuner": partial(LoRA, rank=2)}])
    peft.attach(model, [{"sites": ["conv"], "tuner": partial(LoRA.over, rank=2)}])
    assert peft.tuners(model) and peft.count(model)["tuned"] > 0


def test_hugging_faces_names_explain_themselves():
    with pytest.raises(ImportError, match="Hugging Face"):
        from peft import LoraConfig  # noqa: F401
