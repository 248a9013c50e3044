"""What input costs: cached training sets beside decoding, and the memory of a streamed test set.

The cached loader (uint8 on the device, flips, 224 pixels) stands beside decoding the same JPEG
files with Pillow one by one, in this process, for 32, 96 and 480 pixels; its share of a training
step of ViT-B/16 is that of the slowest. The streamed set does not fit the cache: two workers decode
it, and memory is read on the way, ten times.
"""

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

import data
from data.pictures import Files, decode
from scripts.bench import measure
from scripts.bench.step import model_in, training
from scripts.prepare import number

OPTIONS = {
    "device": "cpu or cuda",
    "images": "1000 in the cached set",
    "batch": "32",
    "stream": "73728 images of a streamed set",
}


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


def seconds(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Median time of `work` after one call to warm up."""
    return median(measure.interleaved({"work": work}, device, repeats)["work"])


def step_seconds(device: str, batch: int) -> float:
    """A forward and backward pass of ViT-B/16 with LoRA at 224 pixels, bf16 on a GPU."""
    shape = measure.shape_of({"device": device, "blocks": "12", "batch": str(batch)}, 8, 2)
    return seconds(training(model_in(shape, "lora"), shape), device, shape.rounds)


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
    with measure.progress(count, "loader (streamed images)") as bar:
        for number, (_, labels) in enumerate(loader.epoch()):
            seen += len(labels)
            bar.update(len(labels))
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


def loader(given: Mapping[str, str]) -> dict:
    device, batch = given["device"], number(given, "batch", 32)
    count = number(given, "images", 1000)
    sizes = [
        cached_and_decoded(device, count, batch, int(size))
        for size in measure.progress_over(["32", "96", "480"], "loader (sizes)")
    ]
    stream = streamed(device, number(given, "stream", 73_728), batch)
    used = batch if device.startswith("cuda") else min(batch, 8)
    step = step_seconds(device, used) / used
    slowest = min(row["cached_images_per_second"] for row in sizes)
    return {
        "images": count,
        "batch_size": batch,
        "cached": sizes,
        "vit_b16_lora_step_seconds_per_image": round(step, 6),
        "input_share_of_a_step": round(1 / slowest / step, 5),
        "stream": stream,
    }
