"""Claims and the index: who is at a run, across processes, machines and clocks."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from peft import ledger
from peft import record as records
from peft.ledger import Held, Index, Watch, claim_of, hold

ROOT = Path(__file__).parent.parent


def elsewhere(folder: Path, number: int = 0) -> Path:
    """A claim of another machine, that was left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"claim.{number}"
    path.write_text("node7:1234:pid:[1]:99@1.0 0123456789abcdef\n")
    return path


def test_a_claim_is_exclusive_and_leaves_nothing(tmp_path):
    run = tmp_path / "run"
    with hold(run):
        assert claim_of(run).holder.endswith(f"@{ledger.psutil.Process().create_time()}")
        assert not claim_of(run).dead
        with pytest.raises(Held, match="is being run by"), hold(run):
            pass
    assert claim_of(run) is None and not list(run.iterdir())


def test_the_claim_of_a_killed_process_is_taken_over_at_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from peft.ledger import hold\n"
        "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(Held), hold(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    assert claim_of(tmp_path).dead
    with hold(tmp_path):
        assert claim_of(tmp_path).number == 1
    assert claim_of(tmp_path) is None


@pytest.mark.parametrize("skew", [-86400, 0, 86400])
def test_another_machine_is_judged_by_its_silence_never_by_its_clock(tmp_path, skew):
    path, now = elsewhere(tmp_path), [0.0]
    watch = Watch(120, clock=lambda: now[0])
    for minute in range(5):
        now[0] = 60.0 * minute
        os.utime(path, (time.time() + skew + minute,) * 2)
        assert not watch.silent(claim_of(tmp_path)), "it gives signs of life"
    for now[0] in (300.0, 360.0):
        assert not watch.silent(claim_of(tmp_path))
    now[0] = 361.0
    assert watch.silent(claim_of(tmp_path))
    with pytest.raises(Held), hold(tmp_path):
        pass
    with hold(tmp_path, silent=[claim_of(tmp_path).name]):
        assert claim_of(tmp_path).number == 1


def race(folder: str, log: str, gate) -> None:
    gate.wait()
    for _ in range(20):
        try:
            with hold(Path(folder), silent=["0123456789abcdef"]), open(log, "a") as file:
                file.write("in\n")
                file.flush()
                time.sleep(0.002)
                file.write("out\n")
                file.flush()
        except Held:
            time.sleep(0.001)


def test_a_race_for_a_dead_claim_has_one_winner_at_a_time(tmp_path):
    context = multiprocessing.get_context("fork")
    gate, log, run = context.Barrier(4), tmp_path / "log", tmp_path / "run"
    elsewhere(run)
    racers = [context.Process(target=race, args=(str(run), str(log), gate)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    lines = log.read_text().split()
    assert lines and lines == ["in", "out"] * (len(lines) // 2), "two were in at once"


def test_who_slept_and_was_outnumbered_stops(tmp_path):
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with hold(tmp_path, every=0.01):
            elsewhere(tmp_path, number=1)
            for _ in range(500):
                if told:
                    break
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told
    assert claim_of(tmp_path).number == 1, "the claim of the other stays"


def test_the_index_is_a_cache(tmp_path, monkeypatch):
    reads = []

    def read(path: Path) -> dict:
        reads.append(path)
        return {"key": "k" * 8} | {key: 1 for key in ledger.KEPT if key != "key"}

    monkeypatch.setattr(ledger.records, "read", read)
    run = tmp_path / "runs/mini/digits/lora-kkkkkkkk"
    run.mkdir(parents=True)
    (run / "record.json").write_text("{}")
    index = Index(tmp_path / "runs")
    assert index.done(run)["seconds"] == 1 and index.done(run.parent / "other-kkkkkkkk") is None
    index.save()
    assert Index(tmp_path / "runs").done(run) == index.done(run) and len(reads) == 1
    (tmp_path / "runs" / ledger.INDEX).write_text('{"cut of')
    assert Index(tmp_path / "runs").done(run) == index.done(run) and len(reads) == 2
    (run / "record.json").write_text("{ }")
    assert index.done(run) and len(reads) == 3, "a record that changed is read again"
    moved = run.rename(run.parent / "lora-abcdefgh")
    with pytest.raises(ValueError, match="is the record of another run"):
        index.done(moved)


def test_a_failure_tells_whether_it_diverged(tmp_path):
    def said(text: str) -> dict:
        (tmp_path / "failure.json").write_text(text)
        return ledger.failure(tmp_path)

    assert ledger.failure(tmp_path) is None
    trace = "Traceback:\n  x\nFloatingPointError: the loss is nan"
    assert said(json.dumps({"reason": "r", "traceback": trace}))["diverged"]
    assert not said(json.dumps({"reason": "r", "traceback": "ValueError: no"}))["diverged"]
    assert "cut off" in said('{"rea')["reason"]


def test_a_run_whose_disk_was_full_is_tried_again(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="make room") as told:
        records.write(tmp_path / "state.pt", b"x")
    trace = "".join(traceback.format_exception(told.value))
    content = {"reason": str(told.value), "traceback": trace}
    (tmp_path / "failure.json").write_text(json.dumps(content))
    assert ledger.failure(tmp_path) is None
