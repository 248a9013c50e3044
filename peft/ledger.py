"""Which runs are done, failed or being run, when many processes on many machines share a folder.

Records stay the only memory. The index beside them is a cache, rebuilt from them when it is missing
or behind. A claim says that somebody is at a run; no clock is compared between machines.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from peft import record as records

INDEX = ".index.json"
KEPT = ("key", "phase", "seconds", "device", "metrics", "selection")


class Held(Exception):
    """Somebody else is at this run; `.claim` says who."""

    def __init__(self, claim: "Claim") -> None:
        super().__init__(f"{claim.path.parent} is being run by {claim.holder}")
        self.claim = claim


class Index:
    """What is known of the runs below a folder, from their records. Asking for a run costs a
    `stat`; a record is read when it is new or changed, and `records.read` refuses a damaged one."""

    def __init__(self, runs_dir: str | Path) -> None:
        self.root, self.entries, self.changed = Path(runs_dir), {}, False
        with suppress(OSError, ValueError):  # a cache: if it is spoilt, the records are there
            self.entries = json.loads((self.root / INDEX).read_text())

    def done(self, folder: Path) -> dict | None:
        """The `KEPT` fields of the run's record; None while there is none. Raises ValueError naming
        a record that was cut off or edited."""
        path = folder / "record.json"
        try:
            found = path.stat()
        except OSError:
            return None
        name, stamp = str(folder.relative_to(self.root)), [found.st_mtime_ns, found.st_size]
        entry = self.entries.get(name)
        if entry is None or entry["stamp"] != stamp:
            record = records.read(path)
            if not folder.name.endswith(record["key"][:8]):
                raise ValueError(
                    f"{path} is the record of another run ({record['key'][:8]}); delete it and run "
                    "that cell again"
                )
            entry = {"stamp": stamp} | {key: record[key] for key in KEPT}
            self.entries[name], self.changed = entry, True
        return entry

    def save(self) -> None:
        """Writes the index; what another process wrote meanwhile is read from its records again."""
        if self.changed and self.root.is_dir():
            records.write(self.root / INDEX, json.dumps(self.entries))
            self.changed = False


def failure(folder: Path) -> dict | None:
    """Why a run failed: its `reason`, and whether it `diverged` (a loss that is no number); None
    where it did not, or where the disk was full: then the same command tries it again."""
    try:
        found = json.loads((folder / "failure.json").read_text())
    except OSError:
        return None
    except ValueError:
        return {"reason": "its failure.json was cut off", "diverged": False}
    last = (found.get("traceback") or "").strip().rpartition("\n")[2]
    if last.startswith("OSError: the disk of "):  # as `records.write` says it
        return None
    return {
        "reason": found.get("reason", "no reason given"),
        "diverged": last.startswith("FloatingPointError"),
    }


@dataclass(frozen=True)
class Claim:
    """`claim.N` in a run's folder. The highest N holds the run; `token` changes while its holder
    lives."""

    path: Path
    number: int
    token: int
    holder: str
    name: str

    @property
    def dead(self) -> bool:
        """True where it is certain: the holder was a process of this machine, and is gone."""
        place, _, process = self.holder.rpartition(":")
        if place != here():
            return False
        number, _, born = process.partition("@")
        try:
            return abs(psutil.Process(int(number)).create_time() - float(born)) > 1
        except (psutil.NoSuchProcess, ValueError):
            return True


def here() -> str:
    """This machine since it was started, and the namespace in which its process numbers count."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        return f"{socket.gethostname()}:{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}:{uuid.getnode():x}"


def claim_of(folder: Path) -> Claim | None:
    """The claim that holds a run; None where nobody is at it."""
    numbers = [
        int(name[6:])
        for name in (os.listdir(folder) if folder.is_dir() else ())
        if name.startswith("claim.") and name[6:].isdecimal()
    ]
    if not numbers:
        return None
    path = folder / f"claim.{max(numbers)}"
    try:
        token, text = path.stat().st_mtime_ns, path.read_text()
    except OSError:  # released meanwhile
        return None
    holder, _, name = text.strip().partition(" ")
    return Claim(path, max(numbers), token, holder, name)


class Watch:
    """Tells when a claim of another machine has been silent for `timeout` seconds of our own clock,
    so that clocks that disagree do no harm."""

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout, self.clock, self.seen = timeout, clock, {}

    def silent(self, claim: Claim) -> bool:
        if claim.dead:
            return True
        token, since = self.seen.get(claim.path, (None, 0.0))
        if token != claim.token:
            self.seen[claim.path] = claim.token, self.clock()
            return False
        return self.clock() - since > self.timeout


@contextmanager
def hold(folder: Path, silent: Iterable[str] = (), every: float = 15.0):
    """Claims a run while the body runs, with a sign of life every so many seconds. Raises `Held`
    where somebody else is at it. `silent` names holders that were found dead.

    A dead claim is not removed but outnumbered: only one process can create `claim.N+1`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = claim_of(folder)
    if before and not before.dead and before.name not in silent:
        raise Held(before)
    number = before.number + 1 if before else 0
    path, name = folder / f"claim.{number}", uuid.uuid4().hex
    born = psutil.Process().create_time()
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        raise Held(claim_of(folder) or Claim(path, number, 0, "another process", "")) from None
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{here()}:{os.getpid()}@{born} {name}\n")
    now, below = claim_of(folder), folder / f"claim.{number - 1}"
    if now is None or now.name != name or (before and below.is_file() and not _same(below, before)):
        path.unlink(missing_ok=True)  # two came at once: both step back
        raise Held(now or Claim(path, number, 0, "another process", ""))
    over = threading.Event()

    def live() -> None:
        while not over.wait(every):
            with suppress(OSError):  # a shared filesystem may be away for a moment
                os.utime(path)
            mine = claim_of(folder)
            if mine is not None and mine.number > number and not over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)  # we slept too long: the run is another's now
                return

    threading.Thread(target=live, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        for i in range(number + 1):
            (folder / f"claim.{i}").unlink(missing_ok=True)


def _same(path: Path, claim: Claim) -> bool:
    with suppress(OSError):
        return path.read_text().strip().endswith(claim.name)
    return False
