"""A whole VTAB-shaped run beside the loop of much released code, on the same pictures.

The naive loop decodes every training image with Pillow in every epoch, one by one, takes a plain
step, and after every epoch decodes and scores the whole test set with the tuners in place. Ours
decodes once, keeps the images as numbers, compiles its step where `compile=auto` does (on a GPU),
and scores the test set once, merged. Both are timed
over two epochs that take turns, on `images` training and `test` test images, and scaled to 100
epochs of 1,000 images and VTAB's mean test set of 20,416: what is in `hours` was not run. It is
split into decoding (all of input: waiting for batches), compiling, steps and evaluation (forward
passes).
"""

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms

import data
import peft
from data.pictures import Files
from peft.optimiser import make_optimizer, spared
from peft.pack import Pack
from peft.speed import compiled
from scripts.bench import measure
from scripts.bench.loader import images_of, pictures
from scripts.prepare import number

OPTIONS = {
    "device": "cpu or cuda",
    "backbone": "vit_b16_in21k",
    "blocks": "12",
    "method": "lora",
    "batch": "8 on a CPU, 32 on a GPU",
    "images": "16 training images timed an epoch on a CPU, 1000 on a GPU",
    "test": "32 test images timed on a CPU, 20416 on a GPU",
    "pixels": "256, width and height of the JPEG files",
    "workers": "0 on a CPU, whose cores train; 4 on a GPU",
}
EPOCHS, TRAIN, TEST = 100, 1000, 20_416  # the last is VTAB-1k's mean: 387,904 / 19
TIMED = 2


class Decoded(torch.utils.data.Dataset):
    """Files, decoded and resized whenever they are asked for."""

    def __init__(self, files: list[Path], count: int, flip: bool, pixels: int):
        self.files, self.count = files, count
        self.transform = transforms.Compose(
            [
                transforms.Resize((pixels, pixels), transforms.InterpolationMode.BICUBIC),
                *([transforms.RandomHorizontalFlip()] if flip else []),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.files[i % len(self.files)]) as picture:
            return self.transform(picture.convert("RGB")), i % 10


class Cycle:
    """An `Images.open` over a few files, again and again."""

    def __init__(self, files: Files):
        self.files = files

    def __call__(self, i: int):
        return self.files(i % len(self.files.names))


class Clock(dict):
    """Seconds by part."""

    def waiting(self, part: str, batches: Iterable, device: str) -> Iterator:
        """The batches, on the device; the time until each is there belongs to the part."""
        iterator, done = iter(batches), object()
        while True:
            start = time.perf_counter()
            batch = next(iterator, done)
            if batch is not done:
                batch = [tensor.to(device) for tensor in batch]
            measure.wait(device)
            self[part] = self.get(part, 0.0) + time.perf_counter() - start
            if batch is done:
                return
            yield batch

    def doing(self, part: str, work, device: str) -> None:
        self[part] = self.get(part, 0.0) + measure.timed(work, device)


def evaluated(clock: Clock, model: nn.Module, batches: Iterable, device: str) -> None:
    """Scores batches, as `eval.evaluate` does, with a clock."""
    model.eval()
    for images, labels in clock.waiting("test_input", batches, device):

        @torch.no_grad()
        def forward(images=images, labels=labels) -> None:
            with measure.mixed(device):
                (model(images).argmax(1) == labels).sum().item()

        clock.doing("evaluation", forward, device)


def trained(clock: Clock, step, batches: Iterable, device: str) -> None:
    for images, labels in clock.waiting("input", batches, device):
        clock.doing("step", lambda images=images, labels=labels: step(images, labels), device)


def plain_step(model: nn.Module, device: str):
    """A training step as in released code, in the precision of ours."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        model.train()
        with measure.mixed(device):
            loss = F.cross_entropy(model(images), labels) + peft.penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_step(cfg, model: nn.Module, device: str):
    """A pack of one, and a training step of train.py with it."""
    start = {name: tensor.clone() for name, tensor in peft.adapter_state(model).items()}
    pack = Pack(model, model, [start], spared(cfg.optim.no_decay))
    optimizer = make_optimizer(pack, [cfg.optim])

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        model.train()
        with measure.mixed(device):
            logits, penalties = pack(images)
            loss = F.cross_entropy(logits.flatten(0, 1), labels) + penalties.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return pack, step


def scaled(clock: Clock, images: int, test: int, epochs: int, tests: int) -> dict[str, float]:
    """Hours of a whole run, from the seconds of `epochs` over `images` and `tests` over `test`."""
    once = clock.get("fill", 0.0) * TRAIN / images
    each = EPOCHS * TRAIN / (epochs * images)
    every = (1 if tests == 1 else EPOCHS) * TEST / (tests * test)
    parts = {
        "decoding": once + each * clock["input"] + every * clock["test_input"],
        "compiling": clock.get("compiling", 0.0),
        "step": each * clock["step"],
        "evaluation": every * clock["evaluation"],
    }
    return {part: round(seconds / 3600, 4) for part, seconds in parts.items()}


def run(given: Mapping[str, str]) -> dict:
    given = {"blocks": "12", "rounds": str(TIMED), **given}
    shape = measure.shape_of(given, batch=8, rounds=TIMED)
    device, batch, on_gpu = shape.device, shape.batch, shape.on_gpu
    images = number(given, "images", TRAIN if on_gpu else 16)
    test = number(given, "test", TEST if on_gpu else 32)
    pixels = number(given, "pixels", 256)
    workers = number(given, "workers", 4 * on_gpu, 0)
    cfg = measure.configured(shape.backbone, given.get("method", "lora"), shape.depth)
    naive, ours = (measure.model_of(cfg, device) for _ in range(2))
    pack, step = our_step(cfg, ours, device)
    steps = plain_step(naive, device), step
    clocks = Clock(), Clock()
    with (
        tempfile.TemporaryDirectory() as folder,
        measure.progress(2 * TIMED + 1, "run (epochs of both, then a test)") as bar,
    ):
        names = tuple(f"{i:05d}.jpg" for i in range(min(1000, max(images, test))))
        for name, content in zip(names, pictures(len(names), pixels)):
            (Path(folder) / name).write_bytes(content)
        files = [Path(folder) / name for name in names]

        def released(count: int, training: bool) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(
                Decoded(files, count, training, ours.pixels), batch if training else 4 * batch,
                shuffle=training, num_workers=workers, pin_memory=on_gpu,
            )  # fmt: skip

        def own(count: int, training: bool) -> data.Loader:
            found = images_of(tuple(map(str, range(count))), Cycle(Files(Path(folder), names)))
            return data.load(
                found, data.Preset("bench", flip=0.5), image_size=ours.pixels, mean=[0.5] * 3,
                std=[0.5] * 3, train=training, batch_size=batch if training else 4 * batch,
                device=device, workers=workers,
            )  # fmt: skip

        warm = measure.batch_of(ours, batch)
        for step in steps:
            step(*warm)
        cached, whole = own(images, True), EPOCHS * TRAIN // batch
        clocks[1].doing("fill", lambda: next(cached.epoch(0)), device)
        compiling = partial(compiled, pack, cfg, cached, measure.mixed(device), whole)
        clocks[1].doing("compiling", compiling, device)
        step(*warm)
        for epoch in range(TIMED):
            trained(clocks[0], steps[0], released(images, True), device)
            evaluated(clocks[0], naive, released(test, False), device)
            bar.update()
            trained(clocks[1], steps[1], cached.epoch(epoch), device)
            bar.update()
        try:
            still = peft.merge(ours)
        except TypeError:
            still = ours
        evaluated(clocks[1], still, own(test, False).epoch(), device)
        bar.update()
    hours = {
        "naive": scaled(clocks[0], images, test, TIMED, TIMED),
        "ours": scaled(clocks[1], images, test, TIMED, 1),
    }
    totals = {name: round(sum(parts.values()), 4) for name, parts in hours.items()}
    return {
        "measured": f"{TIMED} epochs of each loop",
        **shape.facts,
        "scaled_to": {"epochs": EPOCHS, "train_images": TRAIN, "test_images": TEST},
        "method": cfg.method.name,
        "timed_train_images": images,
        "timed_test_images": test,
        "jpeg_pixels": pixels,
        "workers": workers,
        "compiled": pack.mode,
        "measured_seconds": {
            name: {part: round(seconds, 3) for part, seconds in clock.items()}
            for name, clock in zip(("naive", "ours"), clocks)
        },
        "hours": hours,
        "total_hours": totals,
        "ratio": round(sum(hours["naive"].values()) / sum(hours["ours"].values()), 2),
    }
