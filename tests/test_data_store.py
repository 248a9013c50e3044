"""The store, the archives that are unpacked, and the two commands around them."""

import errno
import io
import json
import sys
import types
from pathlib import Path

import archives_by_hand as by_hand
import numpy as np
import pytest
import requests
from PIL import Image
from test_data_raw import read, shrink
from test_data_vtab import community

from data import Images, Manifest, Rows, store, vtab
from data.archives import ARCHIVES
from peft.config import CONFIGS
from scripts import doctor, prepare


def pictures(count=150, seed=0, pixels="native"):
    rng = np.random.default_rng(seed)
    arrays = rng.integers(0, 256, (count, 9, 11, 3), dtype=np.uint8)
    arrays[::3] = arrays[::3, ..., :1]  # grey ones among them
    ids = tuple(f"picture/{i}" for i in range(count))
    return Images(
        Manifest("svhn", "test", ids, np.arange(count) % 10, 10, "raw", pixels), Rows(arrays)
    )


def stored(root, variant=""):
    source = f"store/{variant}" if variant else "store"
    return store.read(root, "test", "vtab", "svhn", 10, source)


def test_png_is_lossless_and_keeps_the_manifest(tmp_path):
    images = pictures()
    folder = tmp_path / "store/vtab/svhn/raw-png"
    assert store.export(images, folder, "png")
    back = stored(tmp_path)
    assert back.manifest.digest == images.manifest.digest
    assert (back.manifest.source, back.manifest.pixels) == ("raw", "native")
    assert all((back.image(i) == images.image(i)).all() for i in range(len(images)))
    assert sorted(p.name for p in folder.iterdir()) == ["test.bin", "test.json", "test.tsv"]
    assert not store.export(images, folder, "png")  # done already
    store.verify(folder, "test")
    with pytest.raises(ValueError, match=r"is of other images"):
        store.export(pictures(140), folder, "png")


def test_jpeg75_is_pillows_default(tmp_path):
    images = pictures()
    store.export(images, tmp_path / "store/vtab/svhn/raw-jpeg75", "jpeg75")
    back = stored(tmp_path)
    assert back.manifest.pixels == "jpeg75"
    for i in (0, 1, 149):
        file = io.BytesIO()
        Image.fromarray(images.image(i)).save(file, "JPEG")
        explicit = io.BytesIO()
        Image.fromarray(images.image(i)).save(explicit, "JPEG", quality=75, subsampling="4:2:0")
        assert file.getvalue() == explicit.getvalue()
        assert (back.image(i) == np.asarray(Image.open(file))).all()
    with pytest.raises(ValueError, match=r"would so twice"):
        store.export(pictures(pixels="jpeg75"), tmp_path / "x", "jpeg75")
    store.export(pictures(pixels="jpeg75"), tmp_path / "store/vtab/svhn/folder-png", "png")
    with pytest.raises(ValueError, match=r"store/folder-png or store/raw-jpeg75"):
        stored(tmp_path)
    assert stored(tmp_path, "folder-png").manifest.pixels == "jpeg75"  # lossless, of lossy ones
    with pytest.raises(ValueError, match=r"no pixels 'webp'; there are png, jpeg75"):
        store.export(images, tmp_path / "y", "webp")


@pytest.mark.parametrize("cut", [0, 1, 40, 4000])
def test_an_interrupted_export_goes_on(cut, tmp_path):
    images, folder = pictures(), tmp_path / "store/vtab/svhn/raw-png"

    def interrupted(chunks):
        yield next(iter(chunks))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.export(images, folder, "png", interrupted)
    with pytest.raises(ValueError, match=r"was interrupted. Run it again"):
        stored(tmp_path)
    part = folder / "test.bin.part"
    part.write_bytes(part.read_bytes()[: part.stat().st_size - cut])  # lost by the system
    with (folder / "test.tsv.part").open("a") as lines:
        lines.write("picture/64\t4\t99")  # half a line
    done = []
    store.export(images, folder, "png", lambda chunks: (done.append(chunks[0]), chunks)[1])
    assert 0 < done[0] <= 64
    back, whole = stored(tmp_path), tmp_path / "whole"
    store.export(images, whole, "png")
    assert all((back.image(i) == images.image(i)).all() for i in range(len(images)))
    for kind in ("bin", "tsv", "json"):  # as if it had never been interrupted
        assert (folder / f"test.{kind}").read_bytes() == (whole / f"test.{kind}").read_bytes()


def test_an_export_of_other_images_is_not_mixed_in(tmp_path):
    folder = tmp_path / "store/vtab/svhn/raw-png"
    with pytest.raises(KeyboardInterrupt):
        store.export(pictures(), folder, "png", lambda chunks: stop(chunks))
    other = pictures()
    other = Images(other.manifest.take(range(149, -1, -1)), other.open)
    with pytest.raises(ValueError, match=r"was begun with other images"):
        store.export(other, folder, "png")


def stop(chunks):
    yield chunks[0]
    raise KeyboardInterrupt


def test_a_full_disk_is_seen_before_or_survived(tmp_path, monkeypatch):
    images, folder = pictures(), tmp_path / "store/vtab/svhn/raw-png"
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"GB are free. .* nothing was written"):
            store.export(images, folder, "png")
    assert not list(folder.iterdir())

    def full(chunks):
        yield chunks[0]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"the disk is full. .* goes on from there"):
        store.export(images, folder, "png", full)
    store.export(images, folder, "png")
    assert len(stored(tmp_path)) == 150


def test_damage_in_a_store_is_named(tmp_path):
    images, folder = pictures(), tmp_path / "store/vtab/svhn/raw-png"
    store.export(images, folder, "png")
    content = bytearray((folder / "test.bin").read_bytes())
    content[stored(tmp_path).open.places[7, 0] + 60] ^= 1
    (folder / "test.bin").write_bytes(content)
    assert (stored(tmp_path).image(6) == images.image(6)).all()
    with pytest.raises(ValueError, match=r"'picture/7' is damaged"):
        stored(tmp_path).image(7)
    with pytest.raises(ValueError, match=r"test.bin has changed"):
        store.verify(folder, "test")
    (folder / "test.bin").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"do not belong together"):
        stored(tmp_path)
    (folder / "test.json").unlink()
    (folder / "val200.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no finished 'test'"):
        stored(tmp_path)


def test_prepare_and_doctor_from_archive_to_store(tmp_path, monkeypatch, capsys):
    """The way a user goes, on a small SVHN: missing, raw, exported, read, damaged."""
    small = shrink(monkeypatch, "svhn", by_hand.svhn(tmp_path / "raw"))
    sizes = {"train800": 3, "val200": 2, "train800val200": 5, "test": small.test[2] - small.test[1]}

    def sized(names, suites):
        found = {}
        for name, config in all_datasets(names, suites).items():
            config.splits = sizes
            found[name] = config
        return found

    all_datasets = prepare.datasets
    monkeypatch.setattr(prepare, "datasets", sized)
    monkeypatch.setattr(doctor, "datasets", sized)
    where = f"data_root={tmp_path}"

    def run(command, *arguments):
        status = command.main([*arguments, where])
        output = capsys.readouterr()
        return status, output.out + output.err

    status, text = run(doctor, "dataset=vtab/svhn")
    assert status == 0
    states = {line.split()[1]: line.split()[2] for line in text.splitlines()[1:]}
    assert states == {"folder": "missing", "raw": "found", "tfds": "missing", "store": "missing"}
    assert "test 2" in text
    assert run(doctor, "dataset=vtab/svhn", "source=store")[0] == 1

    for form in ("png", "jpeg75"):
        status, text = run(prepare, "dataset=vtab/svhn", "source=raw", f"pixels={form}")
        assert status == 0
        assert f"svhn/raw-{form}" in text
    assert "already in" in run(prepare, "dataset=vtab/svhn", "source=raw")[1]
    raw = read(tmp_path, "train800val200", "svhn", splits=sizes)
    png = read(tmp_path, "train800val200", "svhn", splits=sizes, source="store/raw-png")
    assert png.manifest.digest == raw.manifest.digest
    assert all((png.image(i) == raw.image(i)).all() for i in range(5))

    assert run(doctor, "dataset=vtab/svhn", "source=store/raw-png", "deep=true")[0] == 0
    file = tmp_path / "store/vtab/svhn/raw-png/test.bin"
    content = bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)
    status, text = run(doctor, "dataset=vtab/svhn", "source=store/raw-png", "deep=true")
    assert status == 1
    assert "wrong" in text
    assert "is damaged" in text
    verify = ("dataset=vtab/svhn", "source=raw", "verify=true")
    status, text = run(prepare, *verify)
    assert status == 1
    assert "test.bin has changed" in text


def test_doctor_says_where_every_backbones_weights_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTS_DIR", str(tmp_path))
    file = tmp_path / "vgg11-8a719046.pth"
    file.write_bytes(bytes(2_000_000))
    lines = dict(line.split(maxsplit=1) for line in doctor.weights())
    assert lines["vgg11_in1k"].startswith("found") and lines["vgg11_in1k"].endswith("(2 MB)")
    mocov3 = lines["vit_b16_mocov3_in1k"]
    assert mocov3.startswith("missing") and f"{tmp_path}/linear-vit-b-300ep.pth.tar" in mocov3
    assert "weights=FILE of https://dl.fbaipublicfiles.com/mae" in lines["vit_b16_mae_avg_in1k"]
    yamls = {path.stem for path in (CONFIGS / "backbone").glob("[!_]*.yaml")}
    assert lines.keys() == {name for name in yamls if not name.startswith("tiny_")}


def test_doctor_names_unreadable_images_before_a_run_does(tmp_path, monkeypatch, capsys):
    sizes = {"train800": 3, "val200": 2, "train800val200": 5, "test": 4}
    community(tmp_path / "vtab-1k", "dtd")
    monkeypatch.setattr(
        doctor, "datasets", lambda names, suites: resized(prepare.datasets(names, suites), sizes)
    )
    command = ["dataset=vtab/dtd", "source=folder", f"data_root={tmp_path}"]
    assert doctor.main(command) == 0
    assert "train800val200 5" in capsys.readouterr().out
    victim = tmp_path / "vtab-1k/dtd/images/val200/000001.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    assert doctor.main(command) == 1
    assert "'images/val200/000001.jpg' cannot be read" in capsys.readouterr().out
    with (tmp_path / "vtab-1k/dtd/test.txt").open("a") as lines:
        lines.write("images/test/000009.jpg 47\n")
    victim.write_bytes((victim.parent / "000000.jpg").read_bytes())
    assert doctor.main(command) == 1
    assert "test.txt, line 5: label 47 is not below 47" in capsys.readouterr().out


def resized(configs, sizes):
    for config in configs.values():
        config.splits = sizes
    return configs


def test_doctor_sees_all_sets_and_says_how_to_get_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WEIGHTS_DIR", str(tmp_path))
    assert doctor.main([f"data_root={tmp_path}"]) == 0
    out = capsys.readouterr().out
    listed = [line.split()[0] for line in out.splitlines() if line.startswith(("vtab/", "fgvc/"))]
    assert len(listed) == len(set(listed)) == 24
    sets, _, weights = out.partition("weights_dir")
    assert sets.count(" missing ") == 24 + 2  # and full CIFAR
    assert "run python -m scripts.fetch_weights dinov2_s14" in weights
    for task, found in vtab.TASKS.items():
        assert f"expected {tmp_path}/vtab-1k/{found.folders[0]} with" in out, task
        assert ARCHIVES[found.archive][2] in out, task


def test_prepare_goes_on_behind_a_set_that_is_not_there(tmp_path, monkeypatch, capsys):
    shrink(monkeypatch, "svhn", by_hand.svhn(tmp_path / "raw"))
    command = ["dataset=vtab/dtd,vtab/svhn", "source=raw", f"data_root={tmp_path}"]
    assert prepare.main(command) == 1
    output = capsys.readouterr()
    assert "dtd: no original archive; expected" in output.err
    assert "vtab/svhn test: 2 images in" in output.out


@pytest.mark.parametrize("command", [prepare, doctor])
def test_commands_explain_what_they_do_not_know(command, tmp_path, capsys):
    for arguments, message in (
        (["dataset=vtab/svnh"], "no dataset 'vtab/svnh'; did you mean vtab/svhn"),
        (["datasets=vtab"], "no option 'datasets=vtab'; did you mean dataset"),
        (["dataset=vtab/dtd", "source=raw"], "expected " if command is prepare else "missing"),
    ):
        assert command.main([*arguments, f"data_root={tmp_path}"]) == 1
        output = capsys.readouterr()
        assert message in output.err + output.out
    switch = "verify" if command is prepare else "deep"
    assert command.main(["dataset=vtab/dtd", f"{switch}=yes", f"data_root={tmp_path}"]) == 1
    assert f"{switch} is 'yes'; it is true or false" in capsys.readouterr().err
    assert command.main(["--help"]) == 0
    assert "data_root=DIR" in capsys.readouterr().out
    assert doctor.main(["dataset=fgvc", "source=raw"]) == 1
    assert "fgvc/cub200 has no source 'raw'" in capsys.readouterr().err


def test_prepare_tfds_without_tensorflow_names_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)
    assert prepare.main(["dataset=vtab/dtd", "source=tfds", f"data_root={tmp_path}"]) == 1
    assert "pip install tensorflow-cpu importlib_resources." in capsys.readouterr().err
    assert prepare.main(["dataset=vtab/sun397", "source=tfds", f"data_root={tmp_path}"]) == 1
    assert "importlib_resources opencv-python-headless." in capsys.readouterr().err


class DownloadError(Exception):
    """As in TFDS, derived from nothing that one might catch."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            requests.ConnectionError(
                "no name", request=requests.Request(url="https://x.org/d.tgz")
            ),
            "https://x.org/d.tgz could not be reached (no name)",
        ),
        (
            DownloadError("Failed to get url\n x. HTTP code: 404."),
            "DownloadError (Failed to get url x.",
        ),
        (AssertionError("Manual directory m is empty."), "AssertionError (Manual directory m"),
    ],
)
def test_a_download_that_fails_is_one_paragraph(error, words, tmp_path, monkeypatch, capsys):
    class Builder:
        def __init__(self, name, data_dir):
            assert (name, data_dir) == ("dtd", tmp_path / "tfds")

        def download_and_prepare(self):
            raise error

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(prepare, "find_spec", lambda name: name)
    stand_in = types.SimpleNamespace(builder=Builder)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", stand_in)
    assert prepare.main(["dataset=vtab/dtd", "source=tfds", f"data_root={tmp_path}"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: dtd: TensorFlow Datasets did not prepare dtd: ")
    assert words in text
    assert text.count("\n") == 1
    assert f"below {tmp_path / 'raw'}, and choose source=raw" in text


def test_the_description_of_a_store_is_complete(tmp_path):
    store.export(pictures(), Path(tmp_path), "png")
    about = json.loads((tmp_path / "test.json").read_text())
    assert about["images"] == 150
    assert about["bytes"] == (tmp_path / "test.bin").stat().st_size
    assert about["manifest_sha256"] == pictures().manifest.digest
