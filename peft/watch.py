"""Watching: the progress bar, log.csv, wandb's mirror, and what a method touches before it trains.

None of this is a source of numbers: those are in the records.
"""

import csv
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from peft.core import own_parameters, tuners
from peft.record import write
from peft.state import count


class Progress:
    """A bar with loss, accuracy, images/s and the time left; plain lines, one an epoch, where there
    is no terminal."""

    def __init__(self, title: str, total: int, done: int, batch_size: int, quiet: bool = False):
        self.title, self.batch_size, self.quiet = title, batch_size, quiet
        self.total, self.first, self.done, self.members = total, done, done, 1
        self.started = time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit="step",
            disable=quiet or not sys.stderr.isatty(),
            mininterval=0.5,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, sums: Tensor) -> None:
        """sums: (K, 3) of the epoch so far; loss * images, right answers, images."""
        self.done, self.members = self.done + 1, len(sums)
        if self.bar.update():  # true when it was redrawn: the only times that a GPU is waited for
            loss, right, seen = sums.sum(0).tolist()
            text = f"loss {loss / seen:.3f}, top-1 {100 * right / seen:.1f} %"
            self.bar.set_postfix_str(f"{text}, {self.speed():.0f} images/s")

    def speed(self) -> float:
        """Images a second, those of all members."""
        return self.members * self.batch_size / self.seconds()

    def seconds(self) -> float:
        """Of a step, on average since the start or the checkpoint."""
        return (time.monotonic() - self.started) / max(1, self.done - self.first)

    def epoch(self, row: Mapping, epochs: int) -> None:
        if self.bar.disable and not self.quiet:
            tested = f", (test) {row['top1']:.1f} %" if row.get("top1") is not None else ""
            left = tqdm.format_interval((self.total - self.done) * self.seconds())
            print(
                f"{self.title}: epoch {row['epoch']}/{epochs}, loss {row['loss']:.3f}, top-1 "
                f"(train) {row['top1_train']:.1f} %{tested}, "
                f"{self.speed():.0f} images/s, {left} left",
                flush=True,
            )


def write_log(folder: Path, log: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, log[0].keys())
    writer.writeheader()
    writer.writerows(log)
    write(folder / "log.csv", text.getvalue())


@contextmanager
def mirror(logger: Mapping, config: dict, folder: Path) -> Iterator[Callable[[dict], None]]:
    """Where an epoch's row is mirrored to. wandb is imported only here, and works offline without a
    key."""
    if logger["name"] == "none":
        yield lambda row: None
        return
    import wandb

    mode = logger["mode"] or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    with wandb.init(
        project=logger["project"],
        entity=logger["entity"],
        mode=mode,
        config=config,
        name=folder.name,
        dir=folder,
        reinit="create_new",
    ) as run:
        yield lambda row: run.log(row, step=row["epoch"])


def per_class(table: Tensor) -> str:
    """The accuracy of every class, a line each, from a confusion matrix (labels, answers)."""
    lines = ["class  images  top-1 %  most often taken for"]
    for c, row in enumerate(table):
        count, wrong = int(row.sum()), row.clone()
        wrong[c] = 0
        rival = f"{int(wrong.argmax())} ({int(wrong.max())})" if wrong.any() else "-"
        right = f"{100 * int(row[c]) / count:.2f}" if count else "-"
        lines.append(f"{c:5}  {count:6}  {right:>7}  {rival}")
    seen = table.sum(1) > 0
    mean = 100 * (table.diagonal()[seen] / table.sum(1)[seen]).mean().item()
    return "\n".join([*lines, f"mean over the classes {mean:.2f} %"])


def write_confusion(path: Path, table: Tensor) -> Path:
    """A confusion matrix as CSV, with the classes' numbers in the first row and column."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["label", *range(len(table))])
    writer.writerows([c, *row] for c, row in enumerate(table.tolist()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text.getvalue())
    return path


def describe(model: nn.Module) -> str:
    """What a method touches and trains, a line a site."""
    placed, lines = tuners(model), []
    for path, tuner in placed.items():
        own = own_parameters(tuner).items()
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in own)
        lines.append(f"  {path:28} {type(tuner).__name__:14} {shapes}")
    added = {id(p) for tuner in placed.values() for p in own_parameters(tuner).values()}
    others = [
        (name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in added
    ]
    lines += [f"  {name:28} {'trains':14} {tuple(p.shape)}" for name, p in others[:40]]
    if len(others) > 40:
        lines.append(f"  ... and {len(others) - 40} more that train")
    counts = count(model)
    share = 100 * counts["tuned"] / counts["backbone"]
    lines.append(
        f"tuned {counts['tuned']:,} ({share:.2f} % of the backbone's {counts['backbone']:,}), "
        f"head {counts['head']:,}"
    )
    return "\n".join(lines)
