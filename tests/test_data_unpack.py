"""Archives that are unpacked: all of one or nothing, over nothing, and nowhere else."""

import errno
import io
import tarfile
import zipfile

import numpy as np
import pytest

from data.unpack import unpack
from scripts import prepare


def archive(path, members):
    """A zip or tar with {name: content}; content None makes a symbolic link."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                info = zipfile.ZipInfo(name)
                info.external_attr = (0o120777 if content is None else 0o100644) << 16
                file.writestr(info, content or b"/etc/passwd")
        return
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(info, io.BytesIO(content or b""))


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_unpack(suffix, tmp_path):
    path, folder = tmp_path / f"vtab{suffix}", tmp_path / "data"
    archive(path, {"vtab-1k/dtd/test.txt": b"a 1\n", "vtab-1k/readme": b"x"})
    unpack(path, folder)
    assert (folder / "vtab-1k/dtd/test.txt").read_text() == "a 1\n"
    assert [p.name for p in folder.iterdir()] == ["vtab-1k"]
    with pytest.raises(FileExistsError, match=r"vtab-1k is there already"):
        unpack(path, folder)
    before = sorted(p for p in tmp_path.rglob("*") if p != path)
    for name, content, message in (
        ("../evil.txt", b"x", r"'../evil.txt' points out"),
        ("/abs/evil.txt", b"x", r"'/abs/evil.txt' points out"),
        ("a/../../evil.txt", b"x", r"'a/../../evil.txt' points out"),
        ("..\\evil.txt", b"x", r"evil.txt' points out"),
        ("new/link", None, r"'new/link' is a link"),
    ):
        archive(path, {"new/ok.txt": b"x", name: content})
        with pytest.raises(ValueError, match=message):
            unpack(path, folder)
        assert sorted(p for p in tmp_path.rglob("*") if p != path) == before
    archive(path, {"new/ok.txt": bytes(np.random.default_rng(0).bytes(5000))})
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:2000])
    with pytest.raises(ValueError, match=r"damaged|neither"):
        unpack(path, folder)
    content[1500] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged"):
        unpack(path, folder)
    assert sorted(p for p in tmp_path.rglob("*") if p != path) == before
    with pytest.raises(FileNotFoundError, match=r"gone.zip is not there"):
        unpack(tmp_path / "gone.zip", folder)


def test_a_disk_that_fills_while_an_archive_is_unpacked(tmp_path, monkeypatch):
    path, folder = tmp_path / "x.zip", tmp_path / "out"
    archive(path, {"a/1": b"1", "a/2": b"2"})
    extract = zipfile.ZipFile.extract

    def full(self, member, target):
        if member.filename == "a/2":
            raise OSError(errno.ENOSPC, "No space left on device")
        return extract(self, member, target)

    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(OSError, match=r"out: the disk became full while x.zip was unpacked"):
        unpack(path, folder)
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    unpack(path, folder)
    assert (folder / "a/2").read_bytes() == b"2"


def test_unpack_takes_the_tar_of_a_folder(tmp_path):
    """`tar czf x.tar.gz .` begins with the member "./"."""
    (tmp_path / "in/dtd").mkdir(parents=True)
    (tmp_path / "in/dtd/test.txt").write_text("a 1\n")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as file:
        file.add(tmp_path / "in", arcname="./")
    unpack(tmp_path / "x.tar.gz", tmp_path / "out")
    assert (tmp_path / "out/dtd/test.txt").read_text() == "a 1\n"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["dtd"]


@pytest.mark.parametrize(("offset", "value"), [(6, 1), (8, 9)], ids=["encrypted", "deflate64"])
def test_zips_that_python_cannot_unpack_are_named(offset, value, tmp_path):
    archive(tmp_path / "x.zip", {"new/a.txt": b"x"})
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[offset] = value  # the flags or the method, here and in the central directory
    content[content.index(b"PK\x01\x02") + offset + 2] = value
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.zip cannot be unpacked here \("):
        unpack(tmp_path / "x.zip", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_unpack_by_command(tmp_path, capsys):
    archive(tmp_path / "a.zip", {"vtab-1k/dtd/test.txt": b"a 1\n"})
    command = [f"archive={tmp_path / 'a.zip'}", "to=.", f"data_root={tmp_path / 'root'}"]
    assert prepare.main(command) == 0
    assert (tmp_path / "root/vtab-1k/dtd/test.txt").exists()
    assert prepare.main(command) == 1
    assert "is there already" in capsys.readouterr().err
