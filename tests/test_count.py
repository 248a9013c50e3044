"""Published parameter counts, as integers. `python -m scripts.count --check` does all of them."""

import re

import pytest

from peft.config import catalogue
from scripts import count

ROWS = count.rows()
METHODS = ("full", "linear", "bitfit", "ssf", "rlrr", "lora")
QUICK = {("vit_b16_in21k", method) for method in METHODS}


def test_every_row_says_how_it_is_counted_or_why_not():
    assert len(ROWS) == 276
    for row in ROWS:
        assert row["run"] or row["reason"], count.name_of(row)
        assert row["agrees"] in ("yes", "no")
        assert not row["run"] or (row["expected"] and row["on"] and row["head"])


def test_rows_of_the_main_tables_are_integers_of_the_models():
    rows = [row for row in ROWS if (row["on"], row["run"]) in QUICK and "Table 2" in row["table"]]
    assert {row["run"] for row in rows} == set(METHODS)
    assert [count.name_of(row) + text for row in rows for text in count.problems(row)] == []
    assert sum(count.reproduce(rows[[row["method"] for row in rows].index("RLRR")])[:2]) == 326_813


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"expected": "326814"}, "288,768 . 38,045 = 326,813, expected 326,814"),
        ({"published": "0.32 M"}, "is 0.33 M against 0.32 M, yet agrees=yes"),
        ({"published": "0.32 M", "agrees": "no"}, "gives no reason"),
        ({"run": ""}, "is not counted and gives no reason"),
        ({"run": "rlrrr"}, "no method 'rlrrr'"),
        ({"overrides": "method.ranks=3"}, "no key 'method.ranks'"),
    ],
)
def test_a_disagreement_is_an_exit_status(change, text, monkeypatch, capsys):
    row = next(row for row in ROWS if row["method"] == "RLRR" and row["expected"] == "326813")
    monkeypatch.setattr(count, "rows", lambda: [row | change])
    monkeypatch.setattr("sys.argv", ["count", "--check"])
    with pytest.raises(SystemExit) as stopped:
        count.main()
    assert stopped.value.code == 1
    assert re.search(text, capsys.readouterr().out)


def test_a_mean_over_tasks_is_weighted():
    row = next(row for row in ROWS if row["run"] == "fact_tk")
    tuned, head, _ = count.reproduce(row)
    ranks = {32: 13, 16: 6}
    mean = sum(n * (2 * 768 * r + 144 * r + r**3) for r, n in ranks.items()) / 19
    assert (tuned, head) == (round(mean), 0) == (68_985, 0)


def test_the_table_shows_a_method_that_no_paper_counts():
    text = count.table("vit_b16_in21k", "vera")
    assert "24,576" in text
    assert "0.029 %" in text


@pytest.mark.full
def test_every_published_count():
    assert {row["run"] for row in ROWS if row["run"]} <= set(catalogue("method"))
    assert count.check() == 0
