"""One run, end to end, on a tiny backbone and made-up images: its record, its bits, its words."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import peft
import train
from peft import record as records
from peft.config import compose

ROOT = Path(train.__file__).parent
TINY = [
    "backbone=tiny_vit",
    "dataset=fake",
    "image_size=32",
    "optim.epochs=2",
    "optim.batch_size=16",
    "device=cpu",
    "workers=0",
]


def config(tmp_path: Path, *overrides: str):
    return compose(
        "train", [*TINY, f"runs_dir={tmp_path}/runs", f"data_root={tmp_path}/data", *overrides]
    )


@contextmanager
def ending_before(step: int) -> Iterator[None]:
    """What trains in this block ends with a MemoryError before it takes this step."""
    rate = train.learning_rate

    def until(now: int, *rest) -> float:
        if now == step:
            raise MemoryError("no room")
        return rate(now, *rest)

    with mock.patch.object(train, "learning_rate", until):
        yield


def folder(tmp_path: Path) -> Path:
    (found,) = tmp_path.glob("runs/fake/fake/*")
    return found


def done(tmp_path: Path) -> dict:
    return records.read(folder(tmp_path) / "record.json")


def test_the_record_is_whole(tmp_path):
    train.run(config(tmp_path))
    record = done(tmp_path)
    assert set(record) == set(records.FIELDS)
    assert (
        set(record["metrics"]) == {"top1_last", "loss_last"}
        and record["trained_on"] == "train800val200"
    )
    assert record["tuned_params"] == 31 * 64 * 6 + 4 * 64 and record["head_params"] == 65 * 4
    assert str(tmp_path) not in json.dumps(record), "a record holds no path of the machine"
    assert sorted(f.name for f in folder(tmp_path).iterdir()) == [
        "adapter.safetensors",
        "log.csv",
        "record.json",
    ]


def test_the_variant_names_what_differs_from_the_yaml(tmp_path):
    train.run(config(tmp_path, "method=lora", "method.rank=2", "method.alpha=2"))
    record = done(tmp_path)
    assert record["variant"] == "alpha=2,rank=2"
    assert set(record["config"]["method"]) == {
        *["name", "rank", "alpha", "dropout"],
        "placements",
        "trainable",
    }
    assert record["tuned_params"] == 4 * 2 * 64 * 6


def test_a_grid_run_sees_no_test_image(tmp_path):
    train.run(config(tmp_path, "phase=grid"))
    record = done(tmp_path)
    assert (
        set(record["metrics"]) == {"top1_val", "loss_last"} and record["trained_on"] == "train800"
    )
    assert set(record["provenance"]["data_sha256"]) == {"train800", "val200"}


def test_peeking_is_recorded_beside_the_last_epoch(tmp_path):
    train.run(
        config(
            tmp_path,
            "protocol=vtab_peek",
            "optim.epochs=3",
            "optim.warmup_epochs=1",
            "image_size=32",
        )
    )
    record = done(tmp_path)
    assert (
        record["selection"] == "best_on_test"
        and record["metrics"]["top1_best"] >= record["metrics"]["top1_last"]
    )


def test_same_seed_same_bits_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.run(config(tmp_path / name, f"seed={seed}", "method.dropout=0.1", "method=lora"))
    a, b, c = (load_file(folder(tmp_path / name) / "adapter.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert done(tmp_path / "a")["metrics"] == done(tmp_path / "b")["metrics"]


def test_steps_instead_of_epochs(tmp_path):
    """The fake set has 5 batches of 16 an epoch: 7 steps are two of them more than one."""
    train.run(config(tmp_path, "optim.steps=7"))
    log = [line.split(",") for line in (folder(tmp_path) / "log.csv").read_text().split()]
    assert [row[log[0].index("images")] for row in log[1:]] == ["80", "32"]
    epochs, steps = config(tmp_path, "optim.epochs=3"), config(tmp_path, "optim.steps=15")
    rates = [train.learning_rate(step, 5, epochs.optim) for step in range(15)]
    assert rates == [train.learning_rate(step, 5, steps.optim) for step in range(15)]
    assert rates[0] < max(rates) == rates[2] > rates[-2] > rates[-1]


def test_a_rate_for_another_batch_size_grows_with_the_batch(tmp_path):
    """VPT: a base rate of 10 is one of 5 for batches of 128."""
    base = config(tmp_path, "optim.lr=10", "optim.lr_base_size=256", "optim.batch_size=128")
    plain = config(tmp_path, "optim.lr=5", "optim.batch_size=128")
    rates = [train.learning_rate(step, 5, base.optim) for step in range(15)]
    assert rates == [train.learning_rate(step, 5, plain.optim) for step in range(15)]
    with pytest.raises(ValueError, match=r"optim.lr_base_size=0 should be null or a number"):
        train.run(config(tmp_path, "optim.lr_base_size=0"))


def test_a_key_added_later_leaves_older_keys_alone(tmp_path):
    """The identity of a run of before is that of today's default."""
    now = records.portable(train.configuration.plain(config(tmp_path)))
    before = json.loads(json.dumps(now))
    for path in records.ADDED_LATER:
        group, _, leaf = path.rpartition(".")
        (before[group] if group else before).pop(leaf, None)
    assert records.key_of(now) == records.key_of(before) and "steps" in now["optim"]


def test_a_finished_run_is_not_repeated(tmp_path, capsys):
    first = train.run(config(tmp_path))
    stamp = (folder(tmp_path) / "record.json").stat().st_mtime_ns
    assert train.run(config(tmp_path, "workers=1", "checkpoint_seconds=5")) == first
    assert (
        folder(tmp_path) / "record.json"
    ).stat().st_mtime_ns == stamp and "already done" in capsys.readouterr().out
    train.run(config(tmp_path, "force=true"))
    assert (folder(tmp_path) / "record.json").stat().st_mtime_ns != stamp


def test_linear_probing_from_cached_features_is_the_long_way(tmp_path, monkeypatch):
    train.run(config(tmp_path / "short", "method=linear"))
    monkeypatch.setattr(
        train, "cached_features", lambda net, batches, scored, _: (net, batches, net, scored)
    )
    train.run(config(tmp_path / "long", "method=linear"))
    short, long = (
        load_file(folder(tmp_path / name) / "adapter.safetensors") for name in ("short", "long")
    )
    assert set(short) == {"head.weight", "head.bias"} == set(long)
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-4)
    assert (
        done(tmp_path / "short")["metrics"]["top1_last"]
        == done(tmp_path / "long")["metrics"]["top1_last"]
    )


def test_it_learns(tmp_path):
    top1 = train.run(config(tmp_path, "method=full", "optim.epochs=6"))
    assert top1 > 50, "four classes: chance is 25 %"


def test_a_loss_that_is_no_number_says_what_to_do(tmp_path):
    with pytest.raises(FloatingPointError, match=r"optim.lr=1e\+12.*smaller"):
        train.run(config(tmp_path, "method=full", "optim.lr=1e12"))
    assert (
        "FloatingPointError"
        in json.loads((folder(tmp_path) / "failure.json").read_text())["traceback"]
    )


def test_weights_that_are_given_are_loaded_whatever_the_yaml_says(tmp_path):
    (tmp_path / "w.pth").write_text("hello")
    with pytest.raises(
        ValueError, match=r"w.pth cannot be read as a checkpoint of tensors \(KeyErr"
    ):
        train.run(config(tmp_path, f"weights={tmp_path}/w.pth"))


def test_an_adapter_of_another_method_lists_every_mismatch(tmp_path):
    lora, ssf = (peft.create("tiny_vit", name, num_classes=4) for name in ("lora", "ssf"))
    with pytest.raises(
        ValueError,
        match=r"(?s)\d+ places.*missing blocks.0.attn.qkv.gamma.*unexpected blocks.0.attn.qkv.down",
    ):
        peft.load_adapter_state(ssf, peft.adapter_state(lora))
    with pytest.raises(ValueError, match=r"\(1?\d*, ?64\) in the file"):
        peft.load_adapter_state(
            peft.create("tiny_vit", "linear", num_classes=7),
            peft.adapter_state(peft.create("tiny_vit", num_classes=4)),
        )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "cut off or edited"),
        (lambda text: text.replace('"seed": 42', '"seed": 43'), "edited: its key"),
        (lambda text: text.replace('"tuned_params"', '"tuned"'), "lacks tuned_params"),
        (lambda text: text.replace('"loss_last": ', '"loss_last": NaN, "x": '), "no numbers"),
    ],
)
def test_a_spoilt_record_is_refused_and_named(tmp_path, spoil, message):
    train.run(config(tmp_path, "optim.epochs=1"))
    path = folder(tmp_path) / "record.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError, match=f"(?s)record.json.*{message}"):
        train.run(config(tmp_path, "optim.epochs=1"))


def test_identity_ignores_the_machine_and_sees_the_rest(tmp_path):
    def key(*overrides: str) -> str:
        return records.key_of(
            records.portable(train.configuration.plain(config(tmp_path, *overrides)))
        )

    same = key()
    assert (
        key(
            "workers=3",
            "device=cuda",
            "runs_dir=/elsewhere",
            "logger=wandb",
            "checkpoint_seconds=1",
            "force=true",
        )
        == same
    )
    changed = [
        "seed=1",
        "data_seed=1",
        "phase=grid",
        "optim.lr=1",
        "method=ssf",
        "image_size=48",
        "precision=fp32",
        "protocol.final.train_on=train800",
    ]
    assert len({same, *(key(change) for change in changed)}) == 1 + len(changed)


def run_command(tmp_path: Path, *arguments: str, **kwargs) -> subprocess.Popen:
    command = [
        sys.executable,
        "train.py",
        *TINY,
        f"runs_dir={tmp_path}/runs",
        f"data_root={tmp_path}/data",
        *arguments,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes, **kwargs)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("method=rlr", "error: there is no method 'rlr'; did you mean rlrr"),
        ("optim.lrr=1", "error: there is no key 'optim.lrr'; did you mean lr"),
        (
            "image_size=30",
            "error: image_size=30 does not fit this backbone, which takes multiples of 16; "
            "the nearest are 16 and 32",
        ),
        ("weights=nowhere.npz", "error: weights=nowhere.npz is not there: name a checkpoint"),
    ],
)
def test_a_typo_is_one_paragraph_and_exit_status_1(tmp_path, argument, message):
    out, err = (process := run_command(tmp_path, argument)).communicate(timeout=120)
    assert process.returncode == 1 and err.startswith(message) and "Traceback" not in err + out


def test_wandb_mirrors_offline(tmp_path):
    settings = {**os.environ, "WANDB_SILENT": "true"}
    settings.pop("WANDB_API_KEY", None)
    _, err = (
        process := run_command(tmp_path, "logger=wandb", "optim.epochs=1", env=settings)
    ).communicate(timeout=180)
    assert process.returncode == 0, err
    assert list(folder(tmp_path).glob("wandb/offline-run-*")) and done(tmp_path)["metrics"]


def test_a_mirror_is_closed_when_its_run_ends(tmp_path, monkeypatch):
    """What wandb has not written by then is lost where a sweep's process leaves."""
    told = []

    class Mirror:
        def __enter__(self):
            return self

        def __exit__(self, kind, *_):
            told.append(kind)

        def log(self, row, step):
            told.append(step)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: Mirror()))
    train.run(config(tmp_path, "logger=wandb", "optim.epochs=2", "optim.warmup_epochs=0"))
    assert told == [1, 2, None]


def test_what_failed_keeps_no_model(tmp_path, monkeypatch):
    """A sweep's process, and a pack that is tried in halves, go on after a failure."""
    kept = []

    def failing(pack, *_):
        kept.append(weakref.ref(pack.model))
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(train, "fit", failing)
    (error,) = train.run_pack([config(tmp_path)])
    gc.collect()
    assert str(error) == "no such kernel" and kept[0]() is None


def test_info_vouches_for_nothing_that_cannot_train(tmp_path, monkeypatch):
    real = train.model_of

    def idle(cfg, device):
        model = real(cfg, device)
        model.idle = torch.nn.Parameter(torch.zeros(1))
        return model

    train.run(config(tmp_path, "info=true"))
    monkeypatch.setattr(train, "model_of", idle)
    with pytest.raises(ValueError, match=r"no gradient reaches 1 of .* trainable tensors: idle"):
        train.run(config(tmp_path, "info=true"))


def test_a_split_of_another_size_is_told(tmp_path):
    """The fake reader makes what it is told, so that another number is told to the loop alone."""
    cfg = config(tmp_path)
    cfg.dataset.reader.splits = {**cfg.dataset.splits}
    cfg.dataset.splits.test = 31
    with pytest.raises(ValueError, match="fake has 32 images in its split 'test', where dataset"):
        train.run(cfg)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(OSError, match=r"cannot write to .*runs_dir=FOLDER"):
        train.run(config(tmp_path))


def test_a_file_that_git_does_not_know_makes_a_checkout_dirty(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=n@n"]
    (tmp_path / "peft").mkdir()
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "empty"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(records, "__file__", str(tmp_path / "peft/record.py"))
    (tmp_path / "notes.txt").write_text("of no consequence")
    assert records.environment()["git_dirty"] is False
    (tmp_path / "peft/mine.py").write_text("# a method of one's own")
    assert records.environment()["git_dirty"] is True
