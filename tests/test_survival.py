"""What ends a run leaves a reason behind, and what interrupts it costs nothing."""

import errno
import json
import shutil
import signal

import pytest
import torch
from PIL import Image
from test_train import config, done, ending_before, folder, run_command

import data
import eval as evaluation
import train
from data import Images
from data.pictures import Files
from peft import record as records
from scripts import kills


def reason(tmp_path) -> str:
    failure = json.loads((folder(tmp_path) / "failure.json").read_text())
    assert failure["status"] == "failed" and failure["traceback"] and failure["config"]
    return failure["reason"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_folder_that_vanishes_is_named(tmp_path, monkeypatch, workers):
    """Images that stream from files, as those of sets too large to keep do."""
    pictures, real = tmp_path / "pictures", evaluation.data.load

    def streamed(images, *rest, **kwargs):
        names = tuple(f"{images.manifest.split}-{i}.png" for i in range(len(images)))
        pictures.mkdir(exist_ok=True)
        for i, name in enumerate(names):
            Image.fromarray(images.image(i)).save(pictures / name)
        images = Images(images.manifest, Files(pictures, names))
        return real(images, *rest, **kwargs, cache_bytes=0)

    rate = train.learning_rate

    def vanish(step, *rest):
        if step == 6:
            shutil.rmtree(pictures, ignore_errors=True)
        return rate(step, *rest)

    monkeypatch.setattr(evaluation.data, "load", streamed)
    monkeypatch.setattr(train, "learning_rate", vanish)
    choice = ["method=lora", "optim.epochs=9", f"workers={workers}"]
    with pytest.raises(OSError, match=r"train800val200-\d+\.png") as caught:
        train.run(config(tmp_path, *choice))
    assert "\n" not in str(caught.value) and str(caught.value) == reason(tmp_path)
    monkeypatch.setattr(train, "learning_rate", rate)
    train.run(config(tmp_path, *choice))  # and it is there again
    assert not (folder(tmp_path) / "failure.json").exists()


@pytest.mark.parametrize("name", ["state.pt", "log.csv", "adapter.safetensors", "record.json"])
def test_a_full_disk_is_named_and_loses_nothing(tmp_path, monkeypatch, name):
    import os

    real = os.fsync

    def full(descriptor):
        if f".{name}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    choice = ["method=lora", "checkpoint_seconds=0"]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"the disk of .*{name} is full: make room") as caught:
        train.run(config(tmp_path, *choice))
    assert caught.value.errno == errno.ENOSPC and "is full" in reason(tmp_path)
    assert not list(folder(tmp_path).glob(".*")), "half a file was left"
    monkeypatch.setattr(os, "fsync", real)
    train.run(config(tmp_path, *choice))
    train.run(config(tmp_path / "whole", *choice))
    one, other = (folder(path) / "adapter.safetensors" for path in (tmp_path, tmp_path / "whole"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nlong story"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_memory_that_does_not_suffice_says_what_to_do(tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(train.Pack, "__call__", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"allocate .*\. optim\.accumulate=2 takes"):
        train.run(config(tmp_path))
    assert "grad_checkpointing=true" in reason(tmp_path) and "\n" not in reason(tmp_path)


def test_a_checkpoint_that_is_not_ones_own(tmp_path):
    for name, lr in (("a", "1e-3"), ("b", "2e-3")):
        with ending_before(3), pytest.raises(MemoryError):
            train.run(config(tmp_path / name, f"optim.lr={lr}", "checkpoint_seconds=0"))
    own, other = (folder(tmp_path / name) / "state.pt" for name in "ab")
    own.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"state.pt is the checkpoint of another configuration"):
        train.run(config(tmp_path / "a", "optim.lr=1e-3"))
    own.write_bytes(other.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"state.pt cannot be read .*delete it to train this run"):
        train.run(config(tmp_path / "a", "optim.lr=1e-3"))
    own.unlink()
    train.run(config(tmp_path / "a", "optim.lr=1e-3"))


def test_what_a_killed_write_left_is_swept_up(tmp_path):
    run = train.Run(config(tmp_path))
    run.folder.mkdir(parents=True)
    (run.folder / ".state.pt.x1y2.part").write_bytes(b"half")
    (run.folder / ".claim").write_text("another's")
    run.prepare()
    assert [path.name for path in run.folder.iterdir()] == [".claim"]


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path):
    process = run_command(tmp_path, "optim.epochs=100", "method=full")
    for line in process.stdout:
        if "epoch 2/" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from the last checkpoint" in err, err
    assert (folder(tmp_path) / "state.pt").is_file() and not (
        folder(tmp_path) / "record.json"
    ).exists()
    process = run_command(tmp_path, "optim.epochs=100", "method=full")
    assert "going on from step" in process.stdout.readline()
    process.kill()
    process.communicate()


def test_sigterm_leaves_a_checkpoint(tmp_path):
    process = run_command(tmp_path, "optim.epochs=100", "method=full", "checkpoint_seconds=1000")
    for line in process.stdout:
        if "epoch 2/" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from the last checkpoint" in err
    state = torch.load(folder(tmp_path) / "state.pt", weights_only=True)
    assert state["history"]["step"] >= 10 and not (folder(tmp_path) / "failure.json").exists()


@pytest.mark.full
def test_kill_9_changes_no_bit(capsys):
    assert kills.main(["kills=2", "seed=1"]) == 0
    assert capsys.readouterr().out.startswith("2 kills, 2 identical results")
    assert kills.main(["kill=2"]) == 2


def test_a_record_is_assembled_from_the_configuration_alone(tmp_path):
    """No field of a record can disagree with its configuration."""
    train.run(config(tmp_path, "phase=grid", "seed=7"))
    record = records.read(folder(tmp_path) / "record.json")
    assert record["seed"] == record["config"]["seed"] == 7
    assert record["trained_on"] == record["config"]["protocol"]["tune"]["train_on"]


@pytest.mark.parametrize(
    ("at", "workers", "stays"), [(3, 0, True), (10, 0, True), (13, 2, True), (7, 1, False)]
)
def test_a_crash_resumes_to_the_same_bits(tmp_path, monkeypatch, at, workers, stays):
    """Whoever decodes, threads or processes, and into a cache or not."""
    choice = ["method=lora", "method.dropout=0.1", "optim.epochs=3", "checkpoint_seconds=0"]
    train.run(config(tmp_path / "whole", *choice))
    choice.append(f"workers={workers}")
    monkeypatch.setattr(data, "FEW", 10)
    monkeypatch.setattr(data.Loader, "_budget", lambda loader: 2**30 * stays)
    with ending_before(at), pytest.raises(MemoryError):
        train.run(config(tmp_path / "cut", *choice))
    failure = json.loads((folder(tmp_path / "cut") / "failure.json").read_text())
    assert failure["reason"] == "no room"
    real, steps = train.learning_rate, []
    monkeypatch.setattr(
        train, "learning_rate", lambda step, *rest: (steps.append(step), real(step, *rest))[1]
    )
    train.run(config(tmp_path / "cut", *choice))
    assert steps[0] == at, "it began again instead of going on"
    whole, cut = folder(tmp_path / "whole"), folder(tmp_path / "cut")
    assert (whole / "adapter.safetensors").read_bytes() == (
        cut / "adapter.safetensors"
    ).read_bytes()
    assert (whole / "log.csv").read_text() == (cut / "log.csv").read_text()
    assert done(tmp_path / "whole")["metrics"] == done(tmp_path / "cut")["metrics"]
    assert not (cut / "failure.json").exists() and not (cut / "state.pt").exists()
