"""One table as Markdown, CSV, LaTeX and HTML. The same table gives the same bytes."""

import csv
import html as web
import io
import re
from collections.abc import Callable

from scripts.tables import DASH, DOUBT, NOTHING, Column, Entry, Line, Table

SOURCES = {"published": "published", "ours": "ours", "delta": "Δ"}
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "†": r"\dag{}", "‡": r"\ddag{}", "±": r"$\pm$", "–": "--", "−": "$-$", "×": r"$\times$",
    "≤": r"$\le$", "Δ": r"$\Delta$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def _fields(table: Table) -> list[tuple[Column, Callable[[Line], Entry]]]:
    """The columns that are shown: the table's, and who measured where both are there."""
    fields = [(column, lambda line, c=column: line.entry(c)) for column in table.columns]
    if {line.source for line in table.lines} != {"ours"}:
        labels = sum(column.kind == "label" for column in table.columns)
        source = Column("source", "Figures", "label")
        fields.insert(labels, (source, lambda line: Entry(SOURCES[line.source])))
    return fields


def _label_once(table: Table, line: Line, column: Column, entry: Entry) -> Entry:
    """Nothing for the label of a row in all but its first line."""
    repeated = column.kind == "label" and column.key != "source"
    return NOTHING if repeated and line is not _first(table, line) else entry


def _first(table: Table, line: Line) -> Line:
    return next(other for other in table.lines if other.row == line.row)


def markdown(table: Table) -> str:
    """As GitHub prints it: best bold, second underlined, notes and missing cells below."""
    marks = {1: "**{}**", 2: "<u>{}</u>"}

    def show(line: Line, column: Column, entry: Entry, first: bool) -> str:
        entry = _label_once(table, line, column, entry)
        text = entry.text.replace("|", r"\|").replace("<", "&lt;")
        text = f"*{text}*" if entry.computed and text else text
        text = marks.get(entry.rank, "{}").format(text) + DOUBT * bool(entry.doubt)
        return text + line.marks * first

    fields = _fields(table)
    text = f"# {table.title}\n\n"
    if fields:
        sides = ["---" if column.kind == "label" else "---:" for column, _ in fields]
        rows = [[column.title for column, _ in fields], sides]
        for line in table.lines:
            marked = _marked(table, line)
            rows.append([show(line, c, get(line), c.key == marked) for c, get in fields])
        text += "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n"
    text += "".join(f"- {note}\n" for note in table.notes)
    if table.errata:
        text += f"\nDoubtful figures ({DOUBT}), as printed; the arithmetic is in errata.md:\n\n"
        text += "".join(f"- {erratum}\n" for erratum in table.errata)
    if table.missing:
        text += "\nMissing, and the command that fills it:\n\n"
        for row in table.missing:
            text += f"- {row.label}: {row.what}" + (f", {row.why}" if row.why else "")
            text += f": `{row.command}`\n" if row.command else "\n"
    return text


def _marked(table: Table, line: Line) -> str:
    """The field that carries a row's marks: its method, or who measured where that stands above."""
    labels = [c.key for c in table.columns if c.kind == "label" and line.entry(c).text]
    if line is not _first(table, line) or not labels:
        return "source"
    return "method" if "method" in labels else labels[-1]


def latex(table: Table) -> str:
    """A `table*` for booktabs and graphicx, no wider than the text, with its notes. The commands
    that fill missing cells are left to the other formats."""

    def show(line: Line, column: Column, entry: Entry, first: bool) -> str:
        entry = _label_once(table, line, column, entry)
        mean, _, std = entry.text.partition(" ± ")
        text = _tex(mean)
        text = rf"\textit{{{text}}}" if entry.computed and text else text
        text = {1: r"\textbf{%s}", 2: r"\underline{%s}"}.get(entry.rank, "%s") % text
        text += rf"{{\scriptsize$\pm${std}}}" if std else ""
        marks = DOUBT * bool(entry.doubt) + (line.marks if first else "")
        return text + (rf"\textsuperscript{{{_tex(marks)}}}" if marks else "")

    fields = _fields(table)
    head = f"% {table.title}\n% Needs \\usepackage{{booktabs,graphicx}}.\n"
    below = [*table.notes, *(f"{DOUBT} {erratum}" for erratum in table.errata)]
    notes = "\\\\\n".join(_tex(note) for note in below)
    if not fields:
        return head + notes + "\n"
    sides = "".join("l" if column.kind == "label" else "r" for column, _ in fields)
    titles = " & ".join(_headed(column) for column, _ in fields)
    lines = [f"\\begin{{tabular}}{{@{{}}{sides}@{{}}}}", r"\toprule", titles + r" \\", r"\midrule"]
    for line in table.lines:
        if line is _first(table, line) and line.row and line.source != "ours":
            lines.append(r"\addlinespace")
        marked = _marked(table, line)
        texts = [show(line, c, get(line), c.key == marked) for c, get in fields]
        lines.append(" & ".join(texts) + r" \\")
    body = "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])
    return (
        f"{head}\\begin{{table*}}[p]\n\\centering\n\\setlength{{\\tabcolsep}}{{3pt}}\n"
        f"\\caption{{{_tex(table.title)}}}\n"
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
        f"{body}}}\n\n\\smallskip\n\\parbox{{\\linewidth}}{{\\scriptsize\\raggedright\n"
        f"{notes}}}\n\\end{{table*}}\n"
    )


def _headed(column: Column) -> str:
    title = _tex(column.title)
    return title if column.kind == "label" else rf"\rotatebox{{90}}{{{title}}}"


def _tex(text: str) -> str:
    text = re.sub(r"`([^`]*)`", r"\1", text)
    return "".join(LATEX.get(sign, sign) for sign in text)


def html(table: Table) -> str:
    """A `<table>` with its notes; best bold, second underlined, the reason of a mark as its title.
    Rows have the class of their source, headings that of their kind."""

    def show(line: Line, column: Column, entry: Entry, first: bool) -> str:
        text = web.escape(entry.text)
        text = f"<i>{text}</i>" if entry.computed and text else text
        text = {1: "<b>{}</b>", 2: "<u>{}</u>"}.get(entry.rank, "{}").format(text)
        if entry.doubt:
            text += f'<sup title="{web.escape(entry.doubt)}">{DOUBT}</sup>'
        if first and line.marks:
            why = "; ".join(line.why.values())
            text += f'<sup title="{web.escape(why)}">{line.marks}</sup>'
        tag = 'th scope="row"' if column.kind == "label" else "td"
        sort = f' data-value="{entry.value:g}"' if entry.value is not None else ""
        return f"<{tag}{sort}>{text}</{tag[:2]}>"

    fields = _fields(table)
    parts = [f"<h2>{web.escape(table.title)}</h2>"]
    if fields:
        parts.append("<table>\n<thead><tr>")
        for column, _ in fields:
            title = web.escape(column.title)
            parts.append(f'<th scope="col" class="{column.kind}">{title}</th>')
        parts.append("</tr></thead>\n<tbody>")
        for line in table.lines:
            marked = _marked(table, line)
            row = "".join(show(line, c, get(line), c.key == marked) for c, get in fields)
            parts.append(f'<tr class="{line.source}">{row}</tr>')
        parts.append("</tbody>\n</table>")
    parts += _list("", table.notes)
    parts += _list("Doubtful figures, as printed", table.errata)
    missing = [f"{row.label}: {row.what}" + (f", {row.why}" if row.why else "")
               for row in table.missing]  # fmt: skip
    commands = [f" <code>{web.escape(row.command)}</code>" * bool(row.command)
                for row in table.missing]  # fmt: skip
    parts += _list("Missing, and the command that fills it", missing, commands)
    return "\n".join(parts) + "\n"


def _list(title: str, sentences: list[str], tails: list[str] | None = None) -> list[str]:
    if not sentences:
        return []
    tails = tails or [""] * len(sentences)
    items = [f"<li>{web.escape(text)}{tail}</li>" for text, tail in zip(sentences, tails)]
    return [*([f"<h3>{title}</h3>"] if title else []), "<ul>", *items, "</ul>"]


def page(table: Table) -> str:
    """A page of its own around the table."""
    style = (
        "body{font:15px/1.4 system-ui,sans-serif;margin:2em;color-scheme:light dark}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
        "th,td{padding:.15em .5em;text-align:right;white-space:nowrap}"
        "th[scope=row]{text-align:left;font-weight:normal}"
        "thead th{border-bottom:1px solid;vertical-align:bottom}"
        "thead th.label{text-align:left}sup{line-height:0}ul{max-width:60em}"
        "tr.published{border-top:1px solid #8884}tr.delta{color:#888}code{overflow-wrap:anywhere}"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>'
        f"{web.escape(table.title)}</title>\n<style>{style}</style>\n{html(table)}</html>\n"
    )


def long(table: Table) -> str:
    """One line for every figure, as CSV: what it is, the value, and what is to be known of it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["backbone", "pretraining", "method", "variant"]
    head = ["table", "row", *names, "source", "marks", "column", "text", "value", "std"]
    writer.writerow([*head, "seeds", "rank", "computed", "doubt", "keys"])
    for line in table.lines:
        for column in table.columns:
            entry = line.entry(column)
            if column.kind == "label" or entry.text in ("", DASH):
                continue
            seeds = sorted({record["seed"] for record in entry.runs})
            keys = " ".join(record["key"][:8] for record in entry.runs)
            value = "" if entry.value is None else f"{entry.value:.6g}"
            std = "" if entry.std is None else f"{entry.std:.4g}"
            known = [line.key.get(name, "") for name in names]
            where = [table.name, line.row + 1, *known, line.source, line.marks, column.key]
            what = [entry.text, value, std, " ".join(map(str, seeds)), entry.rank or ""]
            writer.writerow([*where, *what, int(entry.computed), entry.doubt, keys])
    return text.getvalue()


FORMATS = {"md": markdown, "csv": long, "tex": latex, "html": page}
