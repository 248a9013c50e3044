"""What differs between two runs, in the order that usually explains a gap."""

import pytest
from test_tables import record

from peft import record as records
from scripts import diff


def headings(text: str) -> list[str]:
    lines = text.splitlines()
    return [line for line in lines if line in diff.ORDER or line == "the rest"]


def saved(folder, *found):
    for one in found:
        path = folder / records.folder_of(one["config"], "") / "record.json"
        path.parent.mkdir(parents=True)
        records.write(path, one)
    return folder


ALL = {
    "data and pixels": {"provenance__pixels": "jpeg75"},
    "input statistics": {"provenance__std": [1.0, 1.0, 1.0]},
    "checkpoint": {"provenance__weights_sha256": "other"},
    "protocol and selection": {"trained_on": "train800"},
    "method": {"variant": "rank=8"},
    "hyper-parameters": {"config__optim__lr": 0.1},
    "seeds": {"config__data_seed": 7},
    "versions": {"provenance__versions": {"torch": "9"}},
    "hardware": {"device": "cuda"},
}


@pytest.mark.parametrize("heading", ALL)
def test_one_difference_has_its_heading(heading):
    text = diff.compare(record(), record(**ALL[heading]))
    assert headings(text) == [heading]
    assert text.count("    A ") == text.count("    B ") == 1


def test_everything_at_once_in_order_with_the_gap_on_top():
    changes = {path: value for part in ALL.values() for path, value in part.items()}
    text = diff.compare(record(top1=70.0), record(top1=71.5, **changes))
    assert headings(text) == list(ALL) == list(diff.ORDER)
    assert text.index("+1.50") < text.index("data and pixels")


def test_what_counts_is_compared_where_the_metrics_differ():
    peek = {"top1_last": 70.0, "top1_best": 72.0, "loss_last": 0.5}
    other = record(selection="best_on_test", protocol="vtab_peek", metrics=peek)
    text = diff.compare(record(top1=70.0), other)
    assert "top1_last of A, top1_best of B   +2.00" in text
    assert headings(text) == ["protocol and selection"]


def test_nothing_is_said_of_the_clock_and_of_defaults_added_later():
    later = record(seconds=99.0, images_per_second=1.0)
    for path, value in records.ADDED_LATER.items():
        if path.startswith("optim."):
            later["config"]["optim"][path.removeprefix("optim.")] = value
    text = diff.compare(record(), later)
    assert "Nothing else differs but the clock." in text and not headings(text)


def test_folders_by_cell(tmp_path, capsys):
    ours = saved(tmp_path / "a", *(record("rlrr", t, s, 70 + s) for t in "xy" for s in (1, 2)))
    theirs = [record("rlrr", "x", s, 60 + s, config__optim__lr=0.5) for s in (1, 2)]
    saved(tmp_path / "b", *theirs, record("ssf", "x", 1))
    diff.main([str(ours), str(tmp_path / "b")])
    text = capsys.readouterr().out
    assert "1 cells in both" in text and "71.50 ± 0.71   61.50 ± 0.71   -10.00" in text
    assert "only in A: rlrr, tiny_vit, y" in text and "only in B: ssf, tiny_vit, x" in text
    assert "config.optim.lr, in 1 of 1 cells\n    A 0.001\n    B 0.5" in text


def test_long_values_show_where_they_differ():
    places = [{"sites": ["qkv"], "tuner": {"rank": rank}} for rank in (4, 8)]
    one, other = (record(config__method={"name": "rlrr", "placements": [p]}) for p in places)
    text = diff.compare(one, other)
    assert "config.method.placements.0.tuner.rank\n    A 4\n    B 8" in text
    one, other = (record(provenance__pixels="x" * 200 + end) for end in ("first", "second"))
    text = diff.compare(one, other)
    assert "xfirst" in text and "xsecond" in text and max(map(len, text.splitlines())) < 100


def test_records_and_run_folders_are_taken_alike(tmp_path, capsys):
    one, other = saved(tmp_path / "a", record()), saved(tmp_path / "b", record(top1=60.0))
    diff.main([str(next(one.rglob("record.json"))), str(next(other.rglob("record.json")).parent)])
    assert "-10.00" in capsys.readouterr().out


def test_what_cannot_be_compared(tmp_path):
    saved(tmp_path / "a", record(), record(seed=1))
    saved(tmp_path / "b", record("ssf"), record("ssf", seed=1))
    with pytest.raises(ValueError, match=r"no cell in common.+rlrr.+B has ssf"):
        diff.main([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(FileNotFoundError, match=r"no record\.json below .*nowhere"):
        diff.main([str(tmp_path / "a"), str(tmp_path / "nowhere")])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "failure.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"c \(but a failure\.json"):
        diff.main([str(tmp_path / "a"), str(tmp_path / "c")])
