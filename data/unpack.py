"""Unpacks a downloaded archive without trusting it."""

import errno
import gzip
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError,
)  # fmt: skip


def unpack(archive: Path, folder: Path, progress: Callable[[Iterable], Iterable] = iter) -> None:
    """Unpacks a .zip or .tar(.gz, ...) into `folder`; all of it or nothing, and over nothing.

    Raises ValueError for a damaged or encrypted archive, or a member that points out of the folder
    or is a link, FileExistsError if something of that name is there, and OSError if the disk cannot
    hold it.
    """
    if not archive.exists():
        raise FileNotFoundError(f"{archive} is not there.")
    half = folder / f".{archive.name}.part"
    try:
        with _open(archive) as (members, extract):
            _check(archive, members, folder)
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir(parents=True)
            for member in progress(members):
                extract(member[2], half)
        for entry in half.iterdir():
            entry.rename(folder / entry.name)
    except DAMAGED as error:
        raise ValueError(f"{archive} is damaged ({error}). Download it again.") from error
    except RuntimeError as error:  # what zipfile says of passwords and of foreign compression
        raise ValueError(
            f"{archive} cannot be unpacked here ({error}). Unpack it with another program."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{folder}: the disk became full while {archive.name} was unpacked. Nothing is kept of "
            "it: make room and run the same command again",
        ) from error
    finally:
        shutil.rmtree(half, ignore_errors=True)


class _open:
    """A zip or tar file as ([(name, bytes, member)], extract); links have size -1."""

    def __init__(self, archive: Path):
        self.archive = archive

    def __enter__(self) -> tuple[list[tuple], Callable]:
        if zipfile.is_zipfile(self.archive):
            self.file = zipfile.ZipFile(self.archive)
            # the upper half of the attributes is the Unix mode; 0o120000 marks a symbolic link
            members = [
                (m.filename, -1 if m.external_attr >> 28 == 0o12 else m.file_size, m)
                for m in self.file.infolist()
            ]
            return members, self.file.extract
        if not tarfile.is_tarfile(self.archive):
            raise ValueError(f"{self.archive} is neither a zip nor a tar file, or it is cut short.")
        self.file = tarfile.open(self.archive)
        plain = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
        members = [(m.name, m.size if m.type in plain else -1, m) for m in self.file]
        while self.file.fileobj.read(1 << 20):  # to the end, where the checksum is
            pass
        return members, lambda member, path: self.file.extract(member, path, filter="data")

    def __exit__(self, *error: object) -> None:
        self.file.close()


def _check(archive: Path, members: list[tuple], folder: Path) -> None:
    for name, size, _ in members:
        path = PurePosixPath(name.replace("\\", "/"))  # "./", first in many tar files, has no part
        if path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1]):
            raise ValueError(f"{archive}: member '{name}' points out of the folder. Do not use it.")
        if size < 0:
            raise ValueError(f"{archive}: member '{name}' is a link or device. Do not use it.")
    tops = {PurePosixPath(name).parts[0] for name, _, _ in members if PurePosixPath(name).parts}
    if taken := [top for top in sorted(tops) if (folder / top).exists()]:
        raise FileExistsError(
            f"{folder / taken[0]} is there already and is not written over. Move it away first."
        )
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(size for _, size, _ in members), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free. Make room; "
            "nothing was written."
        )
