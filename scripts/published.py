"""The papers' numbers in results/published/: read, checked, and their means recomputed.

    python -m scripts.published          # every printed mean that its own cells contradict

A table of a paper is never corrected here: what does not add up is printed as it stands and marked.
`errata.csv` names the doubtful cells, `errata.md` has the arithmetic.
"""

import hashlib
import io
import math
import re
import sys
from functools import cache

import pandas as pd

from scripts.runs import GROUPS, PUBLISHED

PAPERS = ("rlrr", "alore", "lava", "superlora")
ROW = ["paper", "table", "benchmark", "backbone", "pretraining", "method", "variant"]
COLUMNS = [*ROW, "dataset", "metric", "value", "std", "params_M", "note"]
CELL = [*ROW[:2], *ROW[3:], "dataset", "metric"]
# Averages that are no average over data sets of datasets.csv: the language benchmarks of LAVA.
OTHERS = {
    "glue": ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"],
    "commonsense": ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa"],
}
SCORES = {"top1", "accuracy", "average", "matthews", "pearson"}  # percent, the higher the better


@cache
def read(name: str) -> pd.DataFrame:
    """One transcribed file, all text; raises ValueError when it is not the one that was checked."""
    digests = dict(
        reversed(line.split()) for line in (PUBLISHED / "SHA256SUMS").read_text().splitlines()
    )
    content = (PUBLISHED / name).read_text()  # universal newlines: a Windows checkout passes
    if hashlib.sha256(content.encode()).hexdigest() != digests[name]:
        raise ValueError(
            f"{PUBLISHED / name} is not the file that was checked against the papers: it was "
            "edited or cut off. Restore it (git checkout). If you corrected it by a paper, say so "
            f"in errata.md and renew SHA256SUMS (sha256sum {' '.join(sorted(digests))})."
        )
    return pd.read_csv(io.StringIO(content), dtype=str, keep_default_na=False)


@cache
def numbers(paper: str) -> pd.DataFrame:
    """One paper's results: every column text as printed, `number` and `decimals` beside them.

    Raises ValueError naming file and line for anything that cannot have been printed there.
    """
    if paper not in PAPERS:
        raise ValueError(f"There is no paper {paper!r}; there is {', '.join(PAPERS)}.")
    path = PUBLISHED / f"{paper}.csv"
    frame = read(path.name)
    if list(frame.columns) != COLUMNS:
        raise ValueError(f"{path} has the columns {list(frame.columns)} instead of {COLUMNS}.")

    def refuse(bad: pd.Series, reason: str) -> None:
        if bad.any():
            line = int(bad.to_numpy().nonzero()[0][0])
            what = ", ".join(filter(None, frame.loc[line, [*ROW, "dataset", "value"]]))
            raise ValueError(f"{path}, line {line + 2}: {reason} ({what}).")

    frame["number"] = pd.to_numeric(frame["value"], errors="coerce")
    frame["decimals"] = frame["value"].str.partition(".")[2].str.len()
    refuse(frame["paper"] != paper, "a row of another paper")
    refuse(frame["number"].isna(), "the value is no number")
    for name in ("std", "params_M"):
        given = frame[name] != ""
        refuse(given & pd.to_numeric(frame[name], errors="coerce").isna(), f"{name} is no number")
    percent = frame["metric"].isin(SCORES)
    refuse(percent & ~frame["number"].between(0, 100), "not a percentage")
    refuse(frame.duplicated([*ROW, "dataset", "metric"]), "a cell that is there already")
    return frame


@cache
def origins() -> dict[tuple, dict[str, str]]:
    """Row -> why it is marked: `peek` (its epoch was chosen on the test set) and `borrowed` (its
    paper did not measure it). Raises ValueError for a rule that no row follows."""
    path, marks = PUBLISHED / "origins.csv", {}
    rows = pd.concat(map(numbers, PAPERS))[ROW].drop_duplicates()
    rules = pd.read_csv(path, dtype=str, keep_default_na=False)
    for line, rule in enumerate(rules.itertuples(), start=2):
        of_paper = rows[rows["paper"] == rule.paper]
        if rule.pretraining:
            of_paper = of_paper[of_paper["pretraining"] == rule.pretraining]
        for table in rule.tables.split("|"):
            for method in rule.methods.split("|"):
                meant = of_paper[(of_paper["table"] == table) & (of_paper["method"] == method)]
                if meant.empty or rule.mark not in ("peek", "borrowed"):
                    raise ValueError(f"{path}, line {line}: {table} has no {method} to mark.")
                for row in meant.itertuples(index=False, name=None):
                    marks.setdefault(row, {})[rule.mark] = rule.reason
    return marks


@cache
def counts() -> dict[tuple[str, str], list[dict[str, str]]]:
    """(paper, table) -> the lines of params_expected.csv about it."""
    frame = pd.read_csv(PUBLISHED / "params_expected.csv", dtype=str, keep_default_na=False)
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for line in frame.to_dict("records"):
        for table in tables_in(line["table"]):
            found.setdefault((line["paper"].lower(), table), []).append(line)
    return found


def tables_in(text: str) -> list[str]:
    """`Table 4a / Suppl. Table 5` -> T4a, S5; `Tables 1 and 5 (CIFAR-10)` -> T1, T5."""
    text = re.sub(r"\(.*", "", text)
    if section := re.search(r"A(\.\d)+", text):
        return [section[0]]
    found, prefix = [], "T"
    for part in re.split(r"/|and|,", text):
        prefix = "S" if "Suppl" in part else prefix
        found += [prefix + number for number in re.findall(r"\b\d+[a-d]?\b", part)]
    split = {"T3": ["T3a", "T3b"]}  # one line for both halves
    return [name for table in found for name in [table, *split.get(table, [])]]


def count_of(row: tuple, printed: str) -> dict[str, str] | None:
    """What params_expected.csv says of one row's printed count: `head` is the convention it follows
    (none: the head is left out), `agrees` whether the models give it, `reason` why not."""
    paper, table, *_, method, _ = row
    lines = [
        line
        for line in counts().get((paper, table), [])
        if (number := _millions(line["published"])) is not None
        and math.isclose(number, float(printed), rel_tol=1e-9)
    ]
    named = [line for line in lines if method in (line["run"], _plain(line["method"]))]
    if len({(line["head"], line["agrees"]) for line in named or lines}) != 1:
        return None
    return (named or lines)[0]


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def _millions(text: str) -> float | None:
    number, _, unit = text.partition(" ")
    if unit == "%" or not number:
        return None
    return float(number) / (1 if unit == "M" else 1e6)


@cache
def tasks() -> dict[str, list[str]]:
    """Group (natural, specialized, structured, fgvc) -> its data sets in the papers' order."""
    frame = read("datasets.csv")
    return {str(group): list(part["dataset"]) for group, part in frame.groupby("group", sort=False)}


@cache
def errata() -> pd.DataFrame:
    """Doubtful figures; kind is `mean` (its own cells contradict it), `cell` or `row` (all of it).

    Raises ValueError for one that no table prints.
    """
    frame = pd.read_csv(PUBLISHED / "errata.csv", dtype=str, keep_default_na=False)
    printed = pd.concat(map(numbers, PAPERS))
    cells = set(printed[CELL].itertuples(index=False, name=None))
    rows = {cell[:-2] for cell in cells}
    for line, erratum in enumerate(frame[CELL].itertuples(index=False, name=None), start=2):
        if erratum not in cells and not (erratum[-2:] == ("", "") and erratum[:-2] in rows):
            raise ValueError(f"{PUBLISHED / 'errata.csv'}, line {line}: no table prints {erratum}.")
    return frame


def averages(benchmark: str) -> dict[str, list[list[str]]]:
    """Name of a mean -> groups of columns: the mean over groups of the means within each."""
    if benchmark == "vtab-1k":
        groups = [tasks()[group] for group in GROUPS]
        means = {f"mean_{group}": [members] for group, members in zip(GROUPS, groups, strict=True)}
        every = [task for members in groups for task in members]
        return means | {"mean_all": [every], "mean_group": groups}
    if benchmark == "fgvc":
        return {"mean_fgvc": [tasks()["fgvc"]]}
    return {"mean_all": [OTHERS[benchmark]]} if benchmark in OTHERS else {}


def recomputed(benchmark: str, cells: dict[str, float]) -> dict[str, float]:
    """The means of one row from its cells; from group means where a table prints no others."""
    means = {}
    for name, groups in averages(benchmark).items():
        if all(task in cells for group in groups for task in group):
            means[name] = sum(sum(cells[t] for t in g) / len(g) for g in groups) / len(groups)
    printed = [cells.get(f"mean_{group}") for group in GROUPS]
    if benchmark == "vtab-1k" and "mean_all" not in means and None not in printed:
        sizes = [len(tasks()[group]) for group in GROUPS]
        weighted = sum(mean * size for mean, size in zip(printed, sizes, strict=True))
        means |= {"mean_all": weighted / sum(sizes), "mean_group": sum(printed) / 3}
    return means


def means(paper: str) -> pd.DataFrame:
    """Every printed mean beside the recomputed one; `off` where they differ by more than rounding.

    Cells have one decimal, so a mean with one decimal may be off by 0.1 and one with two by 0.05.
    """
    frame = numbers(paper)
    found = []
    for row, part in frame[frame["metric"].isin(SCORES)].groupby(ROW, sort=False):
        part = part.set_index("dataset")
        for name, value in recomputed(row[2], part["number"].to_dict()).items():
            if name in part.index:
                printed, decimals = part["number"][name], part["decimals"][name]
                off = abs(printed - value) > (0.05 if decimals > 1 else 0.1) + 1e-9
                metric = part["metric"][name]
                found.append([*row, name, metric, printed, value, off])
    return pd.DataFrame(found, columns=[*ROW, "dataset", "metric", "printed", "recomputed", "off"])


def check() -> pd.DataFrame:
    """The means that are off; raises ValueError unless they are exactly those of errata.csv."""
    found = pd.concat(map(means, PAPERS), ignore_index=True)
    found = found[found["off"]]
    known = errata()
    known = known[known["kind"] == "mean"]
    off, listed = (set(f[CELL].itertuples(index=False, name=None)) for f in (found, known))
    for cells, reason in ((off - listed, "contradicts its cells"), (listed - off, "adds up")):
        if cells:
            raise ValueError(
                f"The mean {', '.join(filter(None, min(cells)))} {reason}, other than errata.csv "
                f"says: a cell of that row in {PUBLISHED} was edited. Restore the file (git "
                "checkout), or, if the paper was misread before, correct errata.csv and errata.md."
            )
    return found


if __name__ == "__main__":
    try:
        print(check().drop(columns=["benchmark", "metric", "off"]).round(2).to_string(index=False))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
