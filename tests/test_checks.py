"""What the keys of a run are called and what they may hold: every one is asked for."""

import re

import pytest
import torch
from omegaconf import OmegaConf

import peft
import train
from peft.checks import NEEDED, RULES, check, check_words
from peft.config import CONFIGS, catalogue, compose, place, plain

# names of files, folders and devices, and what programs fill in: asked for where they are used
ELSEWHERE = {"weights", "device", "runs_dir", "data_root", "weights_dir", "selected_from"}


def test_every_key_of_a_run_has_a_rule():
    top = OmegaConf.load(CONFIGS / "train.yaml").keys() - {"defaults", "hydra"} - ELSEWHERE
    optim = {f"optim.{key}" for name in catalogue("optim") for key in of("optim", name)}
    assert top | optim - {"optim.name"} <= set(RULES)


def of(group: str, name: str) -> dict:
    return plain(compose("train", [f"{group}={name}"])[group])


@pytest.mark.parametrize(
    ("group", "lacks"), [(g, key) for g, keys in NEEDED.items() for key in keys]
)
def test_what_a_yaml_must_have_is_told(group, lacks):
    """By its author's first run, and not after it was trained."""
    cfg = compose("train", ["dataset=fake", "method=lora"])
    OmegaConf.set_struct(cfg, False)
    del cfg[group][lacks]
    with pytest.raises(ValueError, match=f"the yaml of this {group} has no {lacks}"):
        train.run(cfg)


@pytest.mark.parametrize("path", RULES)
def test_every_rule_refuses_something(path):
    fits, means = RULES[path]
    assert means and not fits({}) and not fits(-1.5)


@pytest.mark.parametrize(
    ("group", "name"), [(g, n) for g in ("protocol", "optim") for n in catalogue(g)]
)
def test_the_yamls_keep_to_the_rules(group, name):
    check(plain(compose("train", [f"{group}={name}"])))


@pytest.mark.parametrize("name", catalogue("sweep"))
def test_sweeps_keep_to_the_rules(name):
    check(plain(compose("sweep", [f"sweep={name}"])))


@pytest.mark.parametrize(
    ("program", "word", "message"),
    [
        (
            "train",
            "methud=lora",
            r"no key or group 'methud'; did you mean method\? There is: backb",
        ),
        ("train", "optm.lr=1", "no key or group 'optm'; did you mean optim"),
        ("train", "optim.lrr=1", "no key 'optim.lrr'; did you mean lr"),
        (
            "train",
            "engine=local",
            "'engine' is for sweep.py, train.py takes: backbone, checkpoint_",
        ),
        ("train", "sweep=mini", "'sweep' is for sweep.py, train.py takes"),
        ("train", "merged=true", "'merged' is for eval.py, train.py takes"),
        ("train", "recipe=rlrr_vtab", "sweeps and experiments name its entries"),
        ("eval", "method=lora", "'method' is for train.py, eval.py takes: checkpoint, combine"),
        ("eval", "splt=val", "no key or group 'splt'; did you mean split"),
        ("sweep", "enginee=local", "no key or group 'enginee'; did you mean engine"),
        ("train", "method=", "method has no value; there is: adapter, "),
        ("train", "method=lora,ssf", "several values are several runs: add -m"),
        ("train", "lora", "'lora'; an option is key=value, such as method=lora"),
        ("train", "optim.betas=[1,", "whole, and quoted for the shell"),
        ("eval", "combine=runs", "combine=runs should be null or a list"),
        ("sweep", "sweep=minni", "no sweep 'minni'; did you mean mini"),
    ],
)
def test_a_wrong_word_names_what_there_is(program, word, message):
    with pytest.raises(ValueError, match=message):
        check(plain(compose(program, [word])))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+optim.lrr=1", "no key 'optim.lrr'; did you mean lr"),
        ("+foo=1", "no key or group 'foo'; did you mean"),
        ("~seed", "this run has no seed"),
        ("~optim.lr", "optim has no lr"),
        ("seed=9223372036854775808", "should be a whole number from 0, below 2"),
    ],
)
def test_what_hydra_lets_through_is_refused(word, message):
    with pytest.raises(ValueError, match=message):
        train.Run(compose("train", ["method=lora", word]))


def test_an_error_that_nobody_meant_says_where_it_came_from():
    with pytest.raises(RuntimeError) as slip:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert re.fullmatch(
        r" \(at tests/test_checks.py:\d+, `torch.ones.*`; PEFT_TRACEBACK=1 .*\)", place(slip.value)
    )
    with pytest.raises(ValueError, match="on purpose") as meant:
        raise ValueError("on purpose")
    assert place(meant.value) == ""


def test_a_table_says_how_it_is_narrowed():
    with pytest.raises(ValueError, match=r"dataset=vtab/dtd: .* give 'datasets=\[vtab/dtd\]'"):
        check_words(["dataset=vtab/dtd"], (), table=True)
    with pytest.raises(ValueError, match=r"method=lora: .* rows=\[...\]"):
        check_words(["method=lora"], (), table=True)
    check_words(["optim.epochs=1", "+method.rank=2"], ["optim.lr"], table=True)


@pytest.mark.parametrize("rank", ["many", 2.5])
def test_a_value_of_another_kind_is_named_with_its_site(rank):
    with pytest.raises(TypeError, match=f"qkv.* with rank={rank}, "):
        peft.create("tiny_vit", "lora", rank=rank)
