"""The report: what stands on the page, and what a real browser does with it."""

import csv
import json
import re
from html.parser import HTMLParser

import browser
import pytest
from test_plots import tuned, vtab
from test_tables import record, suite

from scripts import published, report

FEW = ("rlrr/table2", "alore/table18", "lava/table5")
KINDS = ("params", "ranks", "ablation", "heatmap")


class Cells(HTMLParser):
    """Every field of every table: attributes, text, and the attributes of its row and table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[dict] = []
        self.table = self.row = self.cell = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "section":
            self.table = attributes["id"]
        elif tag == "tr":
            self.row = attributes
        elif tag == "td" and self.table:
            self.cell = attributes | {"table": self.table, "row": self.row, "text": ""}
            self.found.append(self.cell)

    def handle_data(self, data):
        if self.cell is not None:
            self.cell["text"] += data

    def handle_endtag(self, tag):
        self.cell = None if tag == "td" else self.cell
        self.table = None if tag == "section" else self.table


def data_of(text: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def made(found: list[dict], few: bool = True, plots: bool = True) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if few:
            patch.setattr(report.papers, "names", lambda: FEW)
            patch.setattr(report, "PLOTS", {k: report.PLOTS[k] for k in KINDS})
        if not plots:
            patch.setattr(report, "_published_plots", lambda *_: None)
        return report.report(found)


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    peek = {"top1_last": 80.0, "top1_best": 90.0, "loss_last": 0.5}
    marked = record("peeking", selection="best_on_test", protocol="vtab_peek", metrics=peek)
    return [*suite(), *tuned("digits", "lora"), marked, *vtab()]


@pytest.fixture(scope="module")
def page(runs) -> str:
    return made(runs)


def test_every_published_field_is_the_line_of_the_csv_that_it_names():
    text = made([], few=False, plots=False)
    files = {}
    for paper in published.PAPERS:
        with open(published.PUBLISHED / f"{paper}.csv", newline="") as file:
            files[paper] = [None, None, *csv.DictReader(file)]  # line 1 is the heading
    cells = [cell for cell in Cells(text).found if "data-line" in cell]
    for cell in cells:
        line = files[cell["table"].partition("-")[0]][int(cell["data-line"])]
        printed = line["value"] + (f" ± {line['std']}" if line["std"] else "")
        assert cell["text"].rstrip("?") == printed
    named = {(c["table"].partition("-")[0], c["data-line"]) for c in cells}
    assert len(named) == len(cells) > 4000


def test_without_runs_the_page_says_so_and_how_to_have_some():
    text = made([], plots=False)
    assert "There are no runs of our own yet" in text and "sweep.py sweep=mini" in text
    assert not data_of(text)["runs"]
    ours = [cell for cell in Cells(text).found if cell["row"].get("class") == "ours"]
    assert ours and {cell["text"] for cell in ours} <= {"–", ""}
    gaps = data_of(text)["tables"]["rlrr-table2"]["missing"]
    assert any("sweep.py" in gap["command"] and "lora" in gap["row"] for gap in gaps)


def test_runs_of_a_field_are_the_records_behind_it(page, runs):
    data = data_of(page)
    cells = [cell for cell in Cells(page).found if cell["table"] == "mini"]
    shown = {cell["row"]["data-label"]: cell for cell in cells if cell["text"] == "48.7 ± 2.1"}
    behind = [data["runs"][i] for i in shown["rlrr"]["data-runs"].split()]
    keys = [r["key"][:16] for r in runs if (r["method"], r["task"]) == ("rlrr", "digits")]
    assert [run["run"] for run in behind] == keys and len(keys) == 3
    assert behind[0]["task, seed"] == "mini/digits, 42" and "fixed" in behind[0]["optimiser"]
    chosen = [run for run in data["runs"].values() if "chosen among 4" in run["optimiser"]]
    assert len(chosen) == 1
    peeking = [run for run in data["runs"].values() if "best epoch on the test" in run["top-1"]]
    assert len(peeking) == 1 and peeking[0]["top-1"].startswith("90.00")


def test_the_page_needs_nothing_else(page):
    assert not re.findall(r"(?:src|href)=[\"'](?!#)(?!data:)[^\"']*", page.replace("xlink:", ""))
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)) <= {
        pair for name in ids for pair in ((name, ""), ("", name))
    }


def test_drawings_follow_the_page_and_keep_their_words(page):
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) > 6 and all('role="img" aria-label=' in svg for svg in drawings)
    assert any("var(--ink)" in svg for svg in drawings) and "#111111" not in "".join(drawings)
    (ticks,) = [svg for svg in drawings if "learning rate and weight decay" in svg[:200]]
    assert ">0.0001<" in ticks and ">0.001<" in ticks  # rounding spares what is said


def test_the_same_records_give_the_same_page(page, runs):
    assert made(runs[::-1]) == page


def test_command_writes_one_file_and_nothing_where_a_record_is_bad(tmp_path, monkeypatch):
    out = tmp_path / "tables" / "report.html"
    monkeypatch.setattr(report, "report", lambda found: "page")
    report.main(["--out", str(out)])
    assert out.read_text() == "page" and [path.name for path in out.parent.iterdir()] == [out.name]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "record.json").write_text("{")
    with pytest.raises(ValueError, match=r"runs/record\.json is no record"):
        report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "other.html")])
    assert not (tmp_path / "other.html").exists()


@pytest.fixture(scope="module")
def open_page(page, tmp_path_factory):
    if not browser.find():
        pytest.skip("no Chromium here (apt install chromium)")
    folder = tmp_path_factory.mktemp("browser")
    path = folder / "report.html"
    path.write_text(page)
    with browser.Browser(folder) as opened:
        opened.path = path
        yield opened


@pytest.fixture
def window(open_page):
    open_page.open(open_page.path)
    return open_page


COLUMN = """[...document.querySelectorAll('#rlrr-table2 tbody:not([hidden])')].map(body =>
    body.rows[0].dataset.label)"""


def test_a_heading_sorts_both_ways_and_back(window):
    before = window.js(COLUMN)
    heading = "#rlrr-table2 th[data-key=mean_all] button"
    window.click(heading)
    down = window.js(COLUMN)
    assert down[0] == "rlrr, vit_b16_augreg_in21k" and down[-1].startswith("linear")
    assert window.js("document.querySelector('#rlrr-table2 [aria-sort]').dataset.key") == "mean_all"
    window.click(heading)
    assert window.js(COLUMN)[0].startswith("linear") and len(window.js(COLUMN)) == len(before)
    window.click(heading)
    assert window.js(COLUMN) == before


def test_sorting_keeps_ours_below_its_published_line(window):
    window.click("#rlrr-table2 th[data-key=mean_all] button")
    bodies = window.js(
        "[...document.querySelectorAll('#rlrr-table2 tbody')].filter(b => b.rows.length === 3)"
        ".map(b => [...b.rows].map(r => r.className + ' ' + r.dataset.label))"
    )
    assert bodies == [[f"{s} bitfit, vit_b16_in21k" for s in ("published", "ours", "delta")]]


def test_words_and_boxes_filter(window):
    window.click("#rlrr-table2 input[type=search]")
    window.type("bitfit in21k")
    assert window.js(COLUMN) == ["bitfit, vit_b16_in21k"]
    count = "document.querySelector('#rlrr-table2 output').textContent"
    assert window.js(count) == "1 of 14 rows"
    window.click("#rlrr-table2 input[value=published]")
    visible = "[...document.querySelectorAll('#rlrr-table2 tbody:not([hidden]) tr:not([hidden])')]"
    assert window.js(visible + ".map(row => row.className)") == ["ours", "delta"]


ABOUT = (
    "document.getElementById('about').hidden ? null : document.getElementById('about').innerText"
)


def test_click_opens_where_a_number_comes_from_and_escape_closes(window):
    window.click("#rlrr-table2 tbody[data-label^='rlrr, vit_b16_in21k'] td")
    said = window.js(ABOUT)
    assert (
        "rlrr, vit_b16_in21k, CIFAR-100: 75.6" in said
        and "results/published/rlrr.csv, line" in said
    )
    window.press("Escape")
    assert window.js(ABOUT) is None
    window.click("#rlrr-table2 tbody[data-label^='bitfit'] tr.ours td")
    said = window.js(ABOUT)
    assert "vtab/cifar100, 42" in said and "sha256 a" in said
    window.press("Escape")
    window.click("#alore-table18 td.doubt")
    assert "Doubtful: " in window.js(ABOUT)
    window.click("#about button")
    assert window.js(ABOUT) is None


def test_a_missing_field_gives_its_command(window):
    window.click("#rlrr-table2 tbody[data-label^='full'] tr.ours td")
    assert "no run of ours" in window.js(ABOUT) and "python sweep.py" in window.js(ABOUT)
    window.press("Escape")


def test_keyboard_alone_is_enough(window):
    window.js("document.querySelector('#mini td[tabindex]').focus()")
    window.press("ArrowRight")
    window.press("ArrowDown")
    place = (
        "[document.activeElement.cellIndex, document.activeElement.closest('tbody').dataset.row]"
    )
    assert window.js(place) == [2, "1"]
    window.press("Enter")
    assert window.js(ABOUT)
    window.press("Escape")
    assert window.js(ABOUT) is None and window.js(place) == [2, "1"]
    assert window.js("document.querySelectorAll('#mini td[tabindex]').length") == 1


def test_hovering_shows_and_leaving_hides(window):
    window.hover("#mini tbody[data-label=rlrr] td:nth-of-type(5)")
    window.js("new Promise(done => setTimeout(done, 500))")
    assert "mini/digits" in (window.js(ABOUT) or "")
    window.hover("h1")
    assert window.js(ABOUT) is None


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_narrow_and_wide_and_follows_the_theme(window, width):
    window.resize(width, 800)
    colours = []
    for dark in (False, True):
        window.dark(dark)
        colours.append(window.js("getComputedStyle(document.body).backgroundColor"))
        assert window.js("document.documentElement.scrollWidth <= innerWidth")
    assert colours[0] == "rgb(255, 255, 255)" and colours[1] != colours[0]
    window.click("#mini td")
    assert window.js(
        "(() => { const r = document.getElementById('about').getBoundingClientRect();"
        " return r.left >= 0 && r.right <= innerWidth && r.bottom <= innerHeight; })()"
    )
    window.press("Escape")
    window.dark(False)
    window.resize(1280, 900)
