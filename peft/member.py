"""One run among those that train together: who it is, where its files are, how it ends."""

import functools
import shutil
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from peft import checks, parallel
from peft import config as configuration
from peft import record as records


@dataclass
class Run:
    """A run's configuration, what of it makes its identity, and its folder. Raises ValueError,
    naming the key, for a value that no run can mean."""

    cfg: DictConfig

    def __post_init__(self) -> None:
        known = configuration.taken("train")
        # an experiment leaves no key by its name
        if gone := [key for key in known if key not in (*self.cfg, "experiment")]:
            raise ValueError(f"this run has no {', '.join(gone)}: leave out ~{gone[0]}")
        if new := [str(key) for key in self.cfg if key not in known]:
            raise ValueError(configuration.unknown(new[0], "train"))
        checks.check(self.cfg)
        self.config = records.portable(configuration.plain(self.cfg))
        self.key = records.key_of(self.config)
        self.folder = records.folder_of(self.config, self.cfg.runs_dir)

    def done(self) -> float | None:
        """Its headline accuracy, where it has a record and is not forced to run again."""
        path = self.folder / "record.json"
        if self.cfg.force or not path.is_file():
            return None
        top1 = headline(records.read(path))
        if parallel.first():
            print(f"already done: {top1:.2f} % in {self.folder} (force=true trains it again)")
        return top1

    def prepare(self) -> OSError | None:
        """Makes a folder to write to, empty with `force`; returns why that cannot be. Of several
        processes the first does."""
        if not parallel.first():
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            records.write(self.folder / ".writable", "")
            (self.folder / ".writable").unlink()
            for stray in self.folder.glob(".*.part"):  # of a run that was killed while it wrote
                stray.unlink()
        except OSError as error:
            problem = OSError(
                f"cannot write to {self.folder}: {error.strerror}. Make it writable, or give "
                "runs_dir=FOLDER"
            )
            problem.errno, problem.__cause__ = error.errno, error
            return problem
        if self.cfg.force:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        return None

    def record(self, **outcome: object) -> dict:
        """The record of what came of it; see `records.assemble`."""
        return records.assemble(
            self.config,
            key=self.key,
            variant=records.variant_of(self.config["method"], as_written(self.cfg.method.name)),
            selected_from=configuration.plain(self.cfg.selected_from),
            **outcome,
        )

    def fail(self, error: Exception) -> Exception:
        """Leaves failure.json and returns what ended the run."""
        reason = {
            "status": "failed",
            "reason": str(error),
            "traceback": "".join(traceback.format_exception(error)),
            "config": self.config,
        }
        for cause in filter(None, (error, error.__cause__)):
            traceback.clear_frames(cause.__traceback__)  # they hold the model and its batches
        path = self.folder / "failure.json"
        # which of several processes failed is known to that one; the others only miss it
        missed = parallel.world() > 1 and "closed by peer" in reason["reason"]
        try:
            if not (missed and path.exists()):
                records.write(path, reason)
        except OSError as other:
            print(f"and {path} could not be written: {other}")
        return error

    def finish(self, outcome: dict | Exception) -> float | Exception:
        """Leaves the record of what `train` returned for this run; returns its headline."""
        if isinstance(outcome, Exception):
            return self.fail(outcome)
        if not parallel.first():
            return headline(outcome)
        try:
            records.write(self.folder / "record.json", records.sealed(outcome))
        except OSError as error:
            return self.fail(error)
        for leftover in ("state.pt", "failure.json"):
            (self.folder / leftover).unlink(missing_ok=True)
        print(
            f"{outcome['method']} on {outcome['task']}: {headline(outcome):.2f} % "
            f"({outcome['selection']}), in {self.folder}"
        )
        return headline(outcome)


@functools.cache
def as_written(method: str) -> dict:
    """A method's yaml with nothing overridden."""
    return configuration.plain(configuration.compose("train", [f"method={method}"]).method)


def weights_name(cfg: DictConfig) -> str:
    """What a record calls the weights of its backbone."""
    if cfg.weights:
        return Path(cfg.weights).name
    return (
        cfg.backbone.model.get("model_name", cfg.backbone.name)
        if cfg.backbone.get("pretrained", True)
        else "random"
    )


def headline(record: Mapping) -> float:
    metrics = record["metrics"]
    return metrics.get("top1_best", metrics.get("top1_last", metrics.get("top1_val")))
