"""The parts of the report as HTML: tables whose fields know where they come from, drawings, prose.

`report.html` is the frame: style, script, and two places to fill. The script looks up what a field
says about itself in one block of data, so that nothing is written twice.
"""

import html
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from scripts import compare, figures, papers, published
from scripts.runs import metric_of, peeks
from scripts.tables import Column, Line, Table

FRAME = Path(__file__).with_name("report.html")
SOURCES = {"published": "published", "ours": "ours", "delta": "Δ"}
# Colours that follow the reader's light or dark page.
THEME = {
    figures.INK: "var(--ink)",
    figures.GREY: "var(--grey)",
    figures.RULE: "var(--rule)",
    figures.PAPER: "var(--paper)",
    figures.BLUE: "var(--blue)",
    figures.ORANGE: "var(--orange)",
}
# What a drawing does not need inside a page: comments, names that nothing refers to, line breaks.
SLIMMER = {
    r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>| id=\"[\w.]+_\d+\"": "",
    r"font-family: 'DejaVu Sans'; | transform=\"rotate\(-?0 [^)]*\)\"": "",
    r"\s*\n\s*": " ",
    r" +(?=[<\"])|(?<=[>\"]) +(?=<)": "",
}


class Page:
    """Collects the parts, and what the script looks up."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.plots = 0
        self.data: dict[str, dict] = {"tables": {}, "runs": {}, "doubts": {}, "why": {}}
        self.known: dict[tuple[str, str], str] = {}

    def add(self, *parts: str) -> None:
        self.parts += parts

    def note(self, kind: str, value: object) -> str:
        """The name under which the script finds a value; equal values have one."""
        text = kind, json.dumps(value, ensure_ascii=False)
        if text not in self.known:
            self.known[text] = str(len(self.data[kind]))
            self.data[kind][self.known[text]] = value
        return self.known[text]

    def text(self) -> str:
        data = json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))
        return Template(FRAME.read_text()).substitute(
            content="\n".join(self.parts), data=data.replace("</", "<\\/")
        )

    def table(self, table: Table) -> None:
        """A table with its tools, notes, doubts, and missing cells with their commands."""
        name, title = name_of(table.name), safe(table.title)
        sources = list(dict.fromkeys(line.source for line in table.lines))
        self.data["tables"][name] = {
            "source": table.title,
            "file": f"results/published/{table.name.partition('/')[0]}.csv",
            "missing": [
                {"row": gap.label, "what": gap.what, "command": gap.command, "why": gap.why}
                for gap in table.missing
            ],
        }
        boxes = "".join(
            f'<label><input type="checkbox" value="{source}" checked> {SOURCES[source]}</label>'
            for source in sources * (len(sources) > 1)
        )
        self.add(
            f'<section class="table" id="{name}"><h3>{title}</h3>',
            '<div class="tools" hidden><label>Filter rows <input type="search" '
            f'placeholder="method, backbone …"></label>{boxes}'
            '<output aria-live="polite"></output></div>',
            f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">',
            f'<table class="{"both" if len(sources) > 1 else "alone"}">{_header(table)}',
        )
        rows: dict[int, list[Line]] = {}
        for line in table.lines:
            rows.setdefault(line.row, []).append(line)
        self.add(*(self._row(table, lines) for lines in rows.values()), "</table></div>")
        notes = [*table.notes, *(f"Doubtful: {erratum}" for erratum in table.errata)]
        self.add('<ul class="notes">', *(f"<li>{safe(note)}</li>" for note in notes), "</ul>")
        if table.missing:
            rows = "1 row" if len(table.missing) == 1 else f"{len(table.missing)} rows"
            self.add(f"<details><summary>Missing runs in {rows}, and the commands</summary>")
            for gap in table.missing:
                why = f" {safe(gap.why)}" if gap.why else ""
                self.add(f"<p><strong>{safe(gap.label)}</strong>: {safe(gap.what)}.{why}</p>")
                self.add(command(gap.command) if gap.command else "")
            self.add("</details>")
        self.add("</section>")

    def _row(self, table: Table, lines: Sequence[Line]) -> str:
        """The lines of one row in a <tbody>, which sorting and filtering keep together."""
        label = compare.label_of(table, lines[0])
        key = ", ".join(f"{name} {value}" for name, value in lines[0].key.items() if value)
        words = " ".join([label, *lines[0].key.values()]).lower()
        places = csv_lines(table, lines[0])
        made = []
        for line in lines:
            why = f' data-why="{self.note("why", line.why)}"' if line.why else ""
            marks = f"<sup>{safe(line.marks)}</sup>" if line.marks else ""
            name = label if line is lines[0] else SOURCES[line.source]
            cells = "".join(
                self._cell(line, column, places.get(column.key, 0) * (line.source == "published"))
                for column in _figures(table)
            )
            made.append(
                f'<tr class="{line.source}" data-label="{safe(label)}"{why}>'
                f'<th scope="row">{safe(name).replace("_", "_<wbr>")}{marks}</th>{cells}</tr>'
            )
        return (
            f'<tbody data-row="{lines[0].row}" data-label="{safe(label)}" data-key="{safe(key)}" '
            f'data-name="{safe(words)}">{"".join(made)}</tbody>'
        )

    def _cell(self, line: Line, column: Column, csv_line: int) -> str:
        entry = line.entry(column)
        classes = ["", "first", "second"][entry.rank : entry.rank + 1]
        classes += ["doubt"] * bool(entry.doubt) + ["computed"] * entry.computed
        if line.source == "delta" and entry.value:
            classes.append("up" if entry.value > 0 else "down")
        shown = " ".join(filter(None, classes))
        attributes = f' class="{shown}"' if shown else ""
        if entry.value is not None:
            attributes += f' data-v="{entry.value:g}"'
        if csv_line:
            attributes += f' data-line="{csv_line}"'
        if entry.doubt:
            attributes += f' data-doubt="{self.note("doubts", entry.doubt)}"'
        if entry.runs:
            runs = " ".join(self.note("runs", provenance(record)) for record in entry.runs)
            attributes += f' data-runs="{runs}"'
        return f"<td{attributes}>{safe(entry.text)}{'?' * bool(entry.doubt)}</td>"

    def plot(self, caption: str, make: Callable[[], Figure]) -> None:
        """An inline drawing whose colours follow the page; the reason, where there is none."""
        try:
            drawn = figures.rendered(make(), "svg", words=True).decode()
        except ValueError as error:
            self.add(
                f"<figure><figcaption>{safe(caption)}: {safe(str(error))}</figcaption></figure>"
            )
            return
        self.plots += 1
        drawn = drawn[drawn.index("<svg") :]
        for what, by in SLIMMER.items():
            drawn = re.sub(what, by, drawn, flags=re.S)
        # Two decimals are enough for a place; words are left alone. Many drawings share one page.
        drawn = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), drawn)
        drawn = re.sub(
            r'(\bid="|"#|url\(#)', rf"\1p{self.plots}-", drawn
        )  # many drawings, one page
        for colour, variable in THEME.items():
            drawn = drawn.replace(colour.lower(), variable)
        drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{safe(caption)}" ', 1)
        self.add(f'<figure><div class="plot">{drawn}</div>')
        self.add(f"<figcaption>{safe(caption)}.</figcaption></figure>")


def _figures(table: Table) -> list[Column]:
    """The columns that hold figures; the labels of a row are one heading."""
    return [column for column in table.columns if column.kind != "label"]


def _header(table: Table) -> str:
    labels = [column.title for column in table.columns if column.kind == "label"]
    first = "Method" if "Method" in labels else labels[0]
    columns = [Column("row", first, "label"), *_figures(table)]
    groups = ""
    if {column.group for column in columns} - {None, "means"}:
        spans: list[list] = []
        for column in columns:
            if spans and spans[-1][0] == column.group:
                spans[-1][1] += 1
            else:
                spans.append([column.group, 1])
        groups = "".join(
            f'<th colspan="{n}" scope="colgroup">{safe(g)}</th>'
            if g
            else f'<td colspan="{n}"></td>'
            for g, n in spans
        )
    heads = "".join(
        f'<th scope="col" class="{column.kind}" data-key="{safe(column.key)}" '
        f'data-title="{safe(column.title)}"><button>{safe(column.title)}</button></th>'
        for column in columns
    )
    groups = f'<tr class="groups">{groups}</tr>' if groups else ""
    return f"<thead>{groups}<tr>{heads}</tr></thead>"


def csv_lines(table: Table, line: Line) -> dict[str, int]:
    """Column -> the line of the paper's CSV that holds the published figure of a row."""
    if line.source != "published":
        return {}
    asked = {name: value for name, value in line.key.items() if value}
    if {"method", "variant"} <= line.key.keys():
        asked["variant"] = line.key["variant"]  # an empty one is the default, not any
    rows = [row for row in _printed(table.name) if asked.items() <= row.items()]
    found = {}
    for column in _figures(table):
        parts = {*column.key.split("/")}
        fitting = [row["line"] for row in rows if parts <= {*row.values()}]
        if len(fitting) == 1:
            found[column.key] = fitting[0]
    return found


@cache
def _printed(name: str) -> list[dict]:
    """The rows of a table in its paper's CSV, each with its line."""
    paper, number = papers.catalogue()[name]
    frame = published.numbers(paper)[[*published.ROW, "dataset", "metric"]]
    rows = frame[frame["table"] == number]
    lines = rows.assign(line=rows.index + 2)  # line 1 is the heading
    return lines.to_dict("records")


def provenance(record: dict) -> dict[str, str]:
    """Where a run's number comes from, as it is shown."""
    config, known, optim = record["config"], record["provenance"], record["config"]["optim"]
    length = f"{optim['steps']} steps" if optim.get("steps") else f"{optim['epochs']} epochs"
    values = [
        f"{name} {optim[key]:g}"
        for name, key in (("learning rate", "lr"), ("weight decay", "weight_decay"))
        if key in optim
    ]
    tried = len(record["selected_from"])
    values.append(f"chosen among {tried} points on validation" if tried else "fixed, not tuned")
    statistics = f"mean {_numbers(known['mean'])}, std {_numbers(known['std'])}"
    made = [f"commit {known['git_commit'][:12]}" if known["git_commit"] else "no commit"]
    made[0] += " with changes" if known["git_dirty"] else ""
    made += [f"{name} {version}" for name, version in known["versions"].items()]
    data = sorted(known["data_sha256"].items())
    return {
        "run": record["key"][:16],
        "task, seed": f"{record['suite']}/{record['task']}, {record['seed']}",
        "top-1": f"{record['metrics'][metric_of(record)]:.2f}"
        + ", of the best epoch on the test set" * peeks(record),
        "protocol": f"{record['protocol']}: {record['trained_on']}, {length}, "
        f"{config['image_size']} pixels",
        "optimiser": ", ".join(values),
        "parameters": f"{record['tuned_params']:,} tuned, {record['head_params']:,} in the head",
        "weights": f"{known['weights']}, sha256 {str(known['weights_sha256'])[:16]}",
        "data": "sha256 " + ", ".join(f"{split} {digest[:12]}" for split, digest in data),
        "pixels": f"{known['pixels']}, {known['kernel']}, {statistics}, {config['precision']}",
        "training": f"{record['seconds'] / 60:.1f} min on {record['device']}, "
        f"{record['peak_memory_bytes'] / 2**20:.0f} MiB",
        "made by": ", ".join(made),
        "from runs": ", ".join(str(key)[:16] for key in record.get("derived_from") or ()),
    }


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def prose(text: str) -> str:
    """The Markdown of errata.md as HTML: headings, paragraphs, lists, tables, bold, code."""
    made = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if match := re.match(r"(#+) (.*)", lines[0]):
            level = min(len(match[1]) + 2, 5)
            made.append(f"<h{level}>{_inline(match[2])}</h{level}>")
            lines = lines[1:]
        if not lines:
            continue
        if lines[0].startswith("|"):
            head, _, *rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines]
            made.append(
                '<div class="scroll"><table class="prose"><thead><tr>'
                + "".join(f'<th class="label" scope="col">{_inline(cell)}</th>' for cell in head)
                + "</tr></thead><tbody>"
                + "".join(f"<tr>{''.join(map(_field, row))}</tr>" for row in rows)
                + "</tbody></table></div>"
            )
        elif re.match(r"[-*] ", lines[0]):
            items = re.split(r"^[-*] ", "\n".join(lines), flags=re.M)[1:]
            made.append("<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>")
        else:
            made.append(f"<p>{_inline(' '.join(lines))}</p>")
    return "\n".join(made)


def _field(text: str) -> str:
    return f'<td class="label">{_inline(text)}</td>'


def _inline(text: str) -> str:
    text = safe(text.strip().replace(r"\|", "|"))
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"(?<!\w)\*([^*\s][^*]*)\*", r"<em>\1</em>", text)
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text)


def safe(text: str | None) -> str:
    return html.escape(text or "")


def name_of(table: str) -> str:
    """The name of a table as an anchor."""
    return re.sub(r"\W+", "-", table)


def command(text: str) -> str:
    return f'<code class="command">{safe(text)}</code>'
