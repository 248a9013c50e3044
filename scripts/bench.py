"""Benchmarks: what things cost, measured side by side in one process.

    python -m scripts.bench loader [device=cuda] [images=1000] [batch=32] [stream=73728]

Writes results/bench/NAME.json (NAME-cuda.json on a GPU), with the hardware it ran on.
"""

import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import peft
from data.manifest import replacing
from data.pictures import Files, decode
from scripts.prepare import options

RESULTS = Path(__file__).parent.parent / "results" / "bench"


def hardware(device: str) -> dict[str, str | int]:
    """Names of what the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [x.partition(":")[2].strip() for x in lines.splitlines() if x.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": Image.__version__,
        "numpy": np.__version__,
    }


def write(name: str, device: str, result: Mapping) -> Path:
    """results/bench/NAME.json, replaced whole."""
    path = RESULTS / f"{name}{'-cuda' if device.startswith('cuda') else ''}.json"
    stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {"benchmark": name, "when": stamp, "hardware": hardware(device), **result}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    return path


def seconds(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Median time of `work` after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def pictures(count: int, size: int) -> list[bytes]:
    """JPEG files (Pillow's default) of windows of natural pictures, `size` pixels wide and high."""
    from skimage import data as skimage_data

    sources = [skimage_data.astronaut(), skimage_data.coffee(), skimage_data.chelsea()]
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        picture = Image.fromarray(sources[i % 3])
        side = int(rng.integers(min(size, 200), min(picture.size) + 1))
        left, top = (int(rng.integers(0, x - side + 1)) for x in picture.size)
        file = io.BytesIO()
        box = (left, top, left + side, top + side)
        picture.resize((size, size), Image.Resampling.BICUBIC, box).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def images_of(names: tuple[str, ...], opener: Callable[[int], np.ndarray]) -> data.Images:
    labels = np.arange(len(names)) % 10
    manifest = data.Manifest("bench", "test", names, labels, 10, "fake", "jpeg75")
    return data.Images(manifest, opener)


def consume(batches: Iterable) -> int:
    return sum(len(labels) for _, labels in batches)


def cached_and_decoded(device: str, count: int, batch: int, size: int) -> dict[str, float]:
    """Images/s of the cached loader (flips, 224 pixels) beside decoding the same files with Pillow,
    resizing and normalising them one by one, in this process.
    """
    preset = data.Preset("bench", flip=0.5)
    with tempfile.TemporaryDirectory() as folder:
        names = tuple(f"{i:05d}.jpg" for i in range(count))
        for name, content in zip(names, pictures(count, size)):
            (Path(folder) / name).write_bytes(content)
        images = images_of(names, Files(Path(folder), names))

        def loader(cache_bytes: int) -> data.Loader:
            return data.load(
                images, preset, image_size=224, mean=[0.5] * 3, std=[0.5] * 3, train=True,
                batch_size=batch, device=device, cache_bytes=cache_bytes,
            )  # fmt: skip

        start = time.perf_counter()
        cached, epoch = loader(2**31), iter(range(10**9))
        next(cached.epoch(0))
        fill = time.perf_counter() - start
        served = seconds(lambda: consume(cached.epoch(next(epoch))), device)
        decoded = seconds(lambda: consume(loader(0).epoch(0)), device, repeats=1)
    return {
        "native_pixels": size,
        "fill_seconds": round(fill, 3),
        "cached_images_per_second": round(count / served, 1),
        "decoded_images_per_second": round(count / decoded, 1),
        "ratio": round(decoded / served, 1),
    }


def step_seconds(device: str, batch: int) -> float:
    """One training step of ViT-B/16 with LoRA at 224 pixels, mixed precision on a GPU."""
    model = peft.create("vit_b16_in21k", "lora", num_classes=100).to(device)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x, y = torch.randn(batch, 3, 224, 224, device=device), torch.arange(batch, device=device)

    def step() -> None:
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device != "cpu"):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return seconds(step, device, repeats=1 if device == "cpu" else 10)


def memory() -> int:
    """Resident bytes of this process and its children, each shared page counted once (Linux)."""
    total, todo = 0, [os.getpid()]
    while todo:
        process = todo.pop()
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += next(int(x.split()[1]) * 1024 for x in rollup if x.startswith("Pss:"))
            for task in Path(f"/proc/{process}/task").iterdir():
                todo += [int(x) for x in (task / "children").read_text().split()]
        except OSError:
            continue
    return total


class Repeated:
    """An `Images.open` over a few encoded pictures, again and again."""

    def __init__(self, files: list[bytes]):
        self.files = files

    def __call__(self, i: int) -> np.ndarray:
        return decode(self.files[i % len(self.files)], str(i))


def streamed(device: str, count: int, batch: int) -> dict[str, float | list]:
    """A test set that does not fit the cache, with two workers: images/s, and memory on the way."""
    images = images_of(tuple(map(str, range(count))), Repeated(pictures(100, 64)))
    loader = data.load(
        images, data.Preset("bench"), image_size=224, mean=[0.5] * 3, std=[0.5] * 3, train=False,
        batch_size=batch, device=device, workers=2, cache_bytes=0,
    )  # fmt: skip
    start, before, seen, marks = time.perf_counter(), memory(), 0, []
    for number, (_, labels) in enumerate(loader.epoch()):
        seen += len(labels)
        if number % max(1, len(loader) // 10) == len(loader) // 20:  # ten times on the way
            marks.append([seen, round(memory() / 2**20)])
    took = time.perf_counter() - start
    return {
        "images": seen,
        "images_per_second": round(seen / took, 1),
        "mebibytes_before": round(before / 2**20),
        "mebibytes_after_images": marks,
        "float32_bytes_if_held": count * 3 * 224 * 224 * 4,
    }


def loader(given: Mapping[str, str]) -> tuple[str, dict]:
    """What input costs: cached training sets against decoding, their share of a ViT-B/16 step, and
    the memory of a streamed test set.
    """
    device, batch = given.get("device", "cpu"), int(given.get("batch", 32))
    count = int(given.get("images", 1000))
    sizes = [cached_and_decoded(device, count, batch, size) for size in (32, 96, 480)]
    stream = streamed(device, int(given.get("stream", 73_728)), batch)
    used = batch if device.startswith("cuda") else min(batch, 8)
    step = step_seconds(device, used) / used
    slowest = min(row["cached_images_per_second"] for row in sizes)
    result = {
        "images": count,
        "batch_size": batch,
        "cached": sizes,
        "vit_b16_lora_step_seconds_per_image": round(step, 6),
        "input_share_of_a_step": round(1 / slowest / step, 5),
        "stream": stream,
    }
    return device, result


COMMANDS = {"loader": (loader, {"device", "images", "batch", "stream"})}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        print(f"{__doc__}\nThere is: {', '.join(COMMANDS)}.")
        return 2
    try:
        command, known = COMMANDS[arguments[0]]
        device, result = command(options(arguments[1:], known))
        path = write(arguments[0], device, result)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path.read_text() + f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
