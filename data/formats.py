"""The file formats that data sets come in and that Pillow does not read."""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO
from zipfile import BadZipFile, ZipFile

import numpy as np

from data.pictures import decode


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Whatever the parsing of a file stumbles over becomes a ValueError that names the file."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"{path} does not hold what it should ({type(error).__name__}: {error}). Take it from "
            "the original archive again."
        ) from error


def matlab(path: Path) -> dict[str, np.ndarray]:
    """The content of a MATLAB file, with an error that names it."""
    from scipy.io import loadmat

    if not path.exists():
        raise FileNotFoundError(f"{path} is not there. Complete the archive.")
    try:
        return loadmat(path)
    except Exception as error:  # scipy raises whatever its parser stumbles over
        raise ValueError(f"{path} is damaged ({error}). Download it again.") from error


def scenes(path: Path) -> Iterator[dict]:
    """The scenes of a CLEVR file one by one: parsed whole, the training file takes gigabytes."""
    text, decoder = path.read_text(), json.JSONDecoder()
    position = text.find("[", text.find('"scenes"')) + 1
    while True:
        while text[position : position + 1] in (" ", ",", "\n", "\t", "\r"):
            position += 1
        if text[position : position + 1] == "]":
            return
        scene, position = decoder.raw_decode(text, position)
        yield scene


@dataclass(frozen=True)
class Npz:
    """A uint8 array in an .npz file that is read through, but never held whole or unpickled."""

    path: Path
    name: str

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
        try:
            with ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as member:
                version = np.lib.format.read_magic(member)[0]
                header = getattr(np.lib.format, f"read_array_header_{version}_0")
                yield member, header(member)[0]
        except (BadZipFile, EOFError, KeyError, ValueError, zlib.error) as error:
            raise ValueError(f"{self.path} is damaged ({error}). Download it again.") from error

    @property
    def shape(self) -> tuple[int, ...]:
        with self._open() as (_, shape):
            return shape

    def take(self, rows: Sequence[int]) -> np.ndarray:
        """Chosen rows, in the order asked for."""
        wanted = {int(row): i for i, row in enumerate(rows)}
        with self._open() as (member, (count, *shape)):
            picked, size = np.empty((len(rows), *shape), dtype=np.uint8), int(np.prod(shape))
            for first in range(0, count, 4096):
                block = np.frombuffer(member.read(min(4096, count - first) * size), dtype=np.uint8)
                for k, row in enumerate(block.reshape(-1, *shape)):
                    if first + k in wanted:
                        picked[wanted[first + k]] = row
        return picked


def norb_matrix(path: Path) -> np.ndarray:
    """A file in NORB's matrix format, mapped: magic, number of dimensions, at least three sizes."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; gunzip the archive's file of that name.")
    magic, dims, *sizes = np.fromfile(path, dtype="<i4", count=6).tolist() + [0] * 6
    dtype = {507333717: "u1", 507333716: "<i4"}.get(magic)
    if dtype is None or not 0 < dims <= 4:
        raise ValueError(f"{path} is no NORB matrix (magic {magic}). Is it still compressed?")
    shape, offset = tuple(sizes[:dims]), 4 * (2 + max(3, dims))
    expected = offset + int(np.prod(shape)) * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {expected}.")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def hdf5(path: str, name: str, row: int | None = None) -> np.ndarray:
    """An array in an HDF5 file, or one row of it, with an error that names the file."""
    import h5py

    try:
        with h5py.File(path) as file:
            return file[name][() if row is None else row]
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}). Download it again.") from error


@dataclass(frozen=True, eq=False)
class Hdf5:
    """An `Images.open` over rows of an HDF5 array (N, H, W, 3). The file is opened for every image:
    handles survive neither fork nor pickling.
    """

    path: str
    name: str
    rows: Sequence[int]

    def __call__(self, i: int) -> np.ndarray:
        return hdf5(self.path, self.name, self.rows[i])


@dataclass(frozen=True, eq=False)
class Records:
    """Serialised `tf.train.Example`s in TFRecord or ArrayRecord files, in file order.

    A TFRecord is: length (8 bytes, little-endian), its checksum (4), the payload, its checksum (4).
    scale: what pixels are multiplied by when the records serve as `Images.open`.
    index: (N, 3) file, position, length; in ArrayRecord files position is the record's number.
    """

    files: tuple[Path, ...]
    index: np.ndarray
    scale: int = 1

    @classmethod
    def of(cls, files: Sequence[Path], scale: int = 1) -> "Records":
        """Raises ValueError for a file that is cut short."""
        index = []
        for number, path in enumerate(files):
            if path.suffix == ".array_record" or ".array_record-" in path.name:
                index += [
                    (number, i, 0) for i in range(_array_reader(path, os.getpid()).num_records())
                ]
                continue
            size, position = path.stat().st_size, 0
            with path.open("rb") as file:
                while position < size:
                    file.seek(position)
                    length = int.from_bytes(file.read(8), "little")
                    if position + 16 + length > size:
                        raise ValueError(f"{path} is cut short at byte {position}. Copy it again.")
                    index.append((number, position + 12, length))
                    position += 16 + length
        return cls(tuple(files), np.array(index, dtype=np.int64).reshape(-1, 3), scale)

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows: Sequence[int]) -> "Records":
        return replace(self, index=self.index[list(rows)])

    def payload(self, i: int) -> bytes:
        number, position, length = self.index[i].tolist()
        path = self.files[number]
        if not length:
            return _array_reader(path, os.getpid()).read([position])[0]
        with path.open("rb") as file:
            file.seek(position)
            return file.read(length)

    def features(self, i: int) -> dict:
        """Name -> feature (`bytes_list`, `float_list`, `int64_list`, each with `.value`)."""
        from tensorflow_datasets.proto import tf_example_pb2  # parses without TensorFlow

        try:
            return dict(tf_example_pb2.Example.FromString(self.payload(i)).features.feature)
        except Exception as error:  # protobuf's DecodeError, whose module moved between versions
            path = self.files[self.index[i, 0]]
            raise ValueError(f"{path}: record {i} is damaged ({error}). Copy it again.") from error

    def __call__(self, i: int) -> np.ndarray:
        """Serves as `Images.open`: the picture in the feature "image"."""
        content = self.features(i)["image"].bytes_list.value[0]
        image = decode(content, f"{self.files[self.index[i, 0]].name}, record {i}")
        return image * np.uint8(self.scale) if self.scale != 1 else image


@lru_cache(maxsize=64)
def _array_reader(path: Path, process: int):
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path))
