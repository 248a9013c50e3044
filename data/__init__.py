"""Images and labels, batched on the device that trains: readers, manifests, presets and one loader
behind them all.

    images = data.mini.read("train800", task="digits", data_root="~/data")  # as every reader
    loader = data.load(images, preset, image_size=56, mean=[0.5] * 3, std=[0.5] * 3,
                       train=True, batch_size=32)
    for inputs, labels in loader.epoch(0): ...

The fixed part of a preset is computed once. Sets that fit into `cache_bytes` then stay on the
device as uint8 and are augmented there (by default 2 GiB on a CPU, on a GPU a quarter of what is
free; the largest of VTAB-1k takes 10 GiB); larger ones stream through worker processes with a
bounded number of batches in flight.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.manifest import Manifest, hash_order
from data.transforms import DRAWS, FLIP, Preset, View, erase, normalise

CHUNK = 2 * 1024**2  # bytes of images that go to the device together
FEW = 2048  # images that threads decode: they share Python's lock, but start at once

__all__ = ["Images", "Loader", "Manifest", "Preset", "View", "hash_order", "load"]


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one split. `open(i)` decodes image i of the manifest to (H, W, 3) uint8; thread
    and process safe.
    """

    manifest: Manifest
    open: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.manifest)

    def image(self, i: int) -> np.ndarray:
        """Image i as (H, W, 3) uint8. Raises ValueError that names an image which is not RGB of 8
        bits.
        """
        array = self.open(i)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise ValueError(
                f"{self.manifest.dataset}: '{self.manifest.ids[i]}' decodes to {array.dtype} of "
                f"shape {array.shape}; expected uint8 (height, width, 3)."
            )
        return array


@dataclass(frozen=True, eq=False)
class Rows:
    """An `Images.open` over an array that holds all images: (N, H, W, 3), or (N, H, W) for grey
    ones.
    """

    array: np.ndarray

    def __call__(self, i: int) -> np.ndarray:
        image = self.array[i]
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


@dataclass(frozen=True, eq=False)
class Joined:
    """An `Images.open` over several, one after another."""

    parts: tuple[Images, ...]

    def __call__(self, i: int) -> np.ndarray:
        for part in self.parts:
            if i < len(part):
                return part.open(i)
            i -= len(part)
        raise IndexError(i)


def join(split: str, parts: Sequence[Images]) -> Images:
    """The images of all parts in turn, as one split."""
    if len(parts) == 1:
        return parts[0]
    manifests = [part.manifest for part in parts]
    ids = tuple(i for m in manifests for i in m.ids)
    labels = np.concatenate([m.labels for m in manifests])
    manifest = replace(manifests[0], split=split, ids=ids, labels=labels)
    return Images(manifest, Joined(tuple(parts)))


def load(
    images: Images,
    preset: Preset,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    train: bool,
    batch_size: int,
    data_seed: int = 0,
    device: str | torch.device = "cpu",
    workers: int = 0,
    drop_last: bool = False,
    flip: bool | None = None,
    task: str | None = None,
    cache_bytes: int | None = None,
) -> "Loader":
    """Batches of `images` under `preset`; see `Loader`.

    mean, std: the backbone's own input statistics, used where the preset says "backbone".
    flip: switches the preset's horizontal flip off (False) or on with probability 0.5 (True); None
    leaves it.
    task: the dataset's name, for presets that flip some tasks only (default: the manifest's).
    """
    probability = preset.flips(task or images.manifest.dataset) if flip is None else 0.5 * flip
    mean, std = preset.statistics(mean, std)
    view = preset.train if train else preset.eval
    return Loader(
        images,
        view,
        flip=probability * train,
        erase=preset.erase * train,
        image_size=image_size,
        mean=mean,
        std=std,
        train=train,
        batch_size=batch_size,
        data_seed=data_seed,
        device=torch.device(device),
        workers=workers,
        drop_last=drop_last,
        cache_bytes=cache_bytes,
    )


@dataclass(eq=False)
class Loader:
    """The batches of one split.

    `epoch(e, start)` yields (images, labels) from batch `start` on: float32 (B, 3, S, S) normalised
    and int64 (B,), both on `device`. When training, order and augmentation are pure functions of
    (data_seed, e, batch), whatever the device and the number of workers, so a resumed run sees what
    an uninterrupted one saw; random crops are resized where the images lie, which on a GPU differs
    by a grey level. Otherwise the order is the manifest's.
    """

    images: Images
    view: View
    flip: float
    erase: float
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: bool
    batch_size: int
    data_seed: int
    device: torch.device
    workers: int
    drop_last: bool
    cache_bytes: int | None

    def __post_init__(self) -> None:
        self._store: Tensor | list[Tensor] | None = None
        self._stays: bool | None = None  # whether there is to be a store
        self._each: float | None = None  # bytes of an image
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if not len(self):
            raise ValueError(
                f"{self.manifest.dataset}/{self.manifest.split} has {self.num_images} images, "
                f"fewer than one batch of {self.batch_size}, and drop_last drops them. "
                "Choose a smaller batch_size or drop_last=false."
            )

    @property
    def manifest(self) -> Manifest:
        return self.images.manifest

    @property
    def provenance(self) -> dict[str, object]:
        """What a record says of its pixels."""
        return {
            "source": self.manifest.source,
            "pixels": self.manifest.pixels,
            "kernel": self.view.kernel,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @property
    def num_images(self) -> int:
        """Images in the split (an epoch has fewer if drop_last drops some)."""
        return len(self.images)

    @property
    def augments(self) -> bool:
        """Whether one epoch differs from another in more than its order."""
        return self.train and (self.view.random or self.flip > 0 or self.erase > 0)

    def __len__(self) -> int:
        batches = self.num_images / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def order(self, e: int) -> np.ndarray:
        """The images of epoch e, in the order in which they come: int64 (num_images,)."""
        rows = np.arange(self.num_images)
        return np.random.default_rng([self.data_seed, e]).permutation(rows) if self.train else rows

    def epoch(self, e: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(e)
        if self._stays is None:  # once, since a GPU's free memory comes and goes
            self._stays = self._bytes() * self.num_images <= self._budget()
        if self._store is None and self._stays:
            self._store = self._prepare()
        stream = _Stream(self, e, order)
        batches = range(start, len(self))
        if self._store is None and self.workers:
            batches = self._decoded(stream, batches, self.batch_size)
        else:
            batches = (stream[b] for b in batches)
        for b, (images, labels) in enumerate(batches, start):
            images, labels = (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
            images = normalise(images, self.mean, self.std)
            if self.erase and self.train:
                images = erase(images, self._draws(e, b, len(images)), self.erase)
            yield images, labels

    def _draws(self, e: int, b: int, count: int) -> np.ndarray:
        """The uniform numbers that vary batch b of epoch e: (count, DRAWS)."""
        # b + 1: numpy pads seeds with zeros, so [s, e, 0] would repeat the numbers of the order
        return np.random.default_rng([self.data_seed, e, b + 1]).random((count, DRAWS))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_store": None}  # workers decode for themselves

    def _fixed(self, i: int) -> Tensor:
        return self.view.fixed(self.images.image(int(i)), self.image_size)

    def _bytes(self) -> float:
        """Of an image after the fixed part, judged by up to eight spread over the split."""
        if self._each is None:
            some = np.unique(np.linspace(0, self.num_images - 1, 8).astype(int))
            self._each = float(np.mean([self._fixed(i).nbytes for i in some]))
        return self._each

    def _budget(self) -> int:
        """Bytes that may stay on the device."""
        if self.cache_bytes is not None:
            return self.cache_bytes
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            used = torch.cuda.memory_allocated(self.device)  # torch keeps more for later
            return (free + torch.cuda.memory_reserved(self.device) - used) // 4
        return 2 * 1024**3

    def _decoded(self, pieces: torch.utils.data.Dataset, which: Sequence, images: int) -> Iterator:
        """Pieces of so many images, from processes. What these have under way, two pieces each, is
        in shared memory, of which a container may have 64 MiB."""
        few, each = self.workers, images * self._bytes()
        if os.path.isdir("/dev/shm"):
            few = min(few, int(shutil.disk_usage("/dev/shm").free / 2 / (2 * each)))
        loader = torch.utils.data.DataLoader(
            pieces,
            batch_size=None,
            sampler=which,
            num_workers=max(1, few),
            prefetch_factor=2,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws a number from the stream of dropout
        )
        try:
            yield from loader
        except Exception as error:
            plain = from_worker(error)
            raise plain from plain.__cause__

    def _prepare(self) -> Tensor | list[Tensor]:
        """Every image after the fixed part, on the device: one tensor if all have the same shape,
        else a list. Few of them are in the memory of the host of a GPU at a time.
        """
        fixed, flats, groups = _Fixed(self), [], []
        size = max(1, int(CHUNK / self._bytes()))
        chunks = [
            range(start, min(start + size, self.num_images))
            for start in range(0, self.num_images, size)
        ]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            if self.workers and self.num_images > FEW:
                found = self._decoded(fixed, chunks, size)
            else:
                found = pool.map(fixed.__getitem__, chunks)
            for flat, shapes in found:
                flats.append(flat.to(self.device, copy=True))  # what is shared has a file open
                groups.append([tuple(shape) for shape in shapes])
        every = {shape for shapes in groups for shape in shapes}
        if len(every) == 1:
            return torch.cat(flats).view(-1, *every.pop())
        return [
            x.view(shape)
            for flat, shapes in zip(flats, groups, strict=True)
            for x, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)
        ]


def from_worker(error: Exception) -> Exception:
    """What went wrong in a process that decodes images, without the traceback that torch makes part
    of the message."""
    first, _, rest = str(error).partition("\n")
    if not (first.startswith("Caught ") and "in DataLoader worker process" in first):
        return error
    said = rest.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    plain = type(error)(said)
    plain.__cause__ = error
    return plain


@dataclass(eq=False)
class _Fixed(torch.utils.data.Dataset):
    """A range of images after the fixed part: all their numbers in a row, and their shapes."""

    loader: Loader

    def __getitem__(self, rows: range) -> tuple[Tensor, list[tuple[int, ...]]]:
        images = [self.loader._fixed(i) for i in rows]
        return torch.cat([x.flatten() for x in images]), [tuple(x.shape) for x in images]


@dataclass(eq=False)
class _Stream(torch.utils.data.Dataset):
    """The batches of one epoch before normalisation, as a map from batch number to (images,
    labels).
    """

    loader: Loader
    e: int
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.loader)

    def __getitem__(self, b: int) -> tuple[Tensor, Tensor]:
        loader, size = self.loader, self.loader.image_size
        rows = self.order[b * loader.batch_size : (b + 1) * loader.batch_size]
        labels = torch.from_numpy(loader.manifest.labels[rows])
        store = loader._store
        varies = loader.train and loader.view.random
        u = loader._draws(self.e, b, len(rows))
        if isinstance(store, Tensor) and not varies:
            images = store[torch.from_numpy(rows).to(store.device, non_blocking=True)]
        else:
            parts = [store[i] if store is not None else loader._fixed(i) for i in rows]
            if varies:
                parts = [loader.view.vary(x, v, size) for x, v in zip(parts, u, strict=True)]
            images = torch.stack(parts)
        if loader.flip and loader.train:
            mirrored = torch.from_numpy(u[:, FLIP] < loader.flip)[:, None, None, None]
            mirrored = mirrored.to(images.device, non_blocking=True)
            images = torch.where(mirrored, images.flip(-1), images)
        return images, labels
