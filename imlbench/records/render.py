"""Tables as text: for terminals, Markdown, LaTeX, HTML, CSV and JSON."""

from __future__ import annotations

import csv
import html
import io
import json
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tabulate import tabulate

from imlbench.records.tables import Column, Row, Table

Format = Literal["terminal", "github", "latex", "html", "csv", "json"]

NOTE = (
    "± is the standard deviation over n seeds; (…) is the standard error over test examples, "
    "shown where n = 1."
)


@dataclass(frozen=True)
class _Style:
    tablefmt: str
    bold: Callable[[str], str]
    escape: Callable[[str], str] = lambda text: text
    title: Callable[[str], str] = lambda text: text


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
    "…": r"\ldots{}",
}


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


_STYLES = {
    "plain": _Style("simple", lambda text: f"{text} *"),
    "terminal": _Style("simple", lambda text: f"\033[1m{text}\033[0m"),
    "github": _Style("github", lambda text: f"**{text}**", title=lambda text: f"### {text}\n"),
    "latex": _Style("latex_raw", lambda text: rf"\textbf{{{text}}}", _escape_latex),
    "html": _Style(
        "unsafehtml", lambda text: f"<b>{text}</b>", html.escape, lambda text: f"<h3>{text}</h3>"
    ),
}


def render(tables: Sequence[Table], format: Format, *, width: int | None = None) -> str:
    """Return the tables as text.

    Arguments:
        tables: From :func:`make_tables`.
        format: One of :data:`Format`. ``terminal`` leaves out columns that do not fit.
        width: Columns of the terminal; by default as found. Zero means no limit and no control
            sequences: the best value is then marked with an asterisk.
    """
    if format in ("csv", "json"):
        records = [record for table in tables for record in _records(table)]
        return _to_csv(records) if format == "csv" else json.dumps(records, indent=2)
    width = shutil.get_terminal_size().columns if width is None else width
    style = _STYLES["plain" if format == "terminal" and not width else format]
    limit = width if format == "terminal" else 0
    return "\n\n".join(_render(table, style, limit, format) for table in tables)


def _to_csv(records: Sequence[Mapping[str, str | float | None]]) -> str:
    fields = dict.fromkeys(name for record in records for name in record)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().rstrip("\n")


def _render(table: Table, style: _Style, width: int, format: str) -> str:
    shown = list(table.columns)
    body = _tabulate(table, shown, style, format)
    while width and len(shown) > 1 and _widest(body) > width:
        shown.pop()
        body = _tabulate(table, shown, style, format)
    notes = [NOTE, *table.notes]
    if any(row.n == 0 for row in table.rows):
        notes.append("Rows without n are published values, for the settings of their source.")
    if format != "terminal":
        notes += [f"{row.model}: {_assignments(row)}." for row in table.rows if row.params]
    if format == "terminal" and not width and any(map(table.has_best, shown)):
        notes.insert(0, "* marks the best of a column.")
    hidden = [column.name for column in table.columns if column not in shown]
    if hidden:
        notes.append(
            f"Not shown for lack of width: {', '.join(hidden)}; see --metric and --format."
        )
    if format == "html":
        text = "".join(f"<p>{style.escape(note)}</p>\n" for note in notes)
    elif format == "latex":
        text = "\n".join(f"% {note}" for note in notes)
    else:
        if width:
            notes = [textwrap.fill(note, width, subsequent_indent="  ") for note in notes]
        text = ("\n\n" if format == "github" else "\n").join(notes)
    gap = "\n\n" if format == "github" else "\n"
    return f"{style.title(style.escape(table.dataset))}\n{body}{gap}{text}".replace(
        "\n\n\n", "\n\n"
    )


def _assignments(row: Row) -> str:
    return ", ".join(f"{name} = {value}" for name, value in row.params.items())


def _widest(text: str) -> int:
    plain = text.replace("\033[1m", "").replace("\033[0m", "")
    return max(len(line) for line in plain.splitlines())


def _tabulate(table: Table, columns: Sequence[Column], style: _Style, format: str) -> str:
    """Lay out one table; on a terminal, long headers are broken at underscores."""
    params = table.varying_params()
    multiline = format == "terminal"
    separator = "\n" if multiline else " "

    def header(column: Column) -> str:
        name = (
            column.name.replace("_", "_\n") if multiline and len(column.name) > 10 else column.name
        )
        unit = f"{separator}{column.unit}" if column.unit else ""
        return style.escape(f"{name}{column.arrow}{unit}")

    def cell(row: Row, column: Column) -> str:
        if column.name not in row.cells:
            return style.escape("–")
        found = row.cells[column.name]
        text = style.escape(str(found))
        return style.bold(text) if found.mean == table.best(column) else text

    body = [
        [
            style.escape(row.model),
            *(style.escape(row.params.get(name, "–")) for name in params),
            str(row.n or style.escape("–")),
            *(cell(row, column) for column in columns),
            _seconds(row.fit_seconds) or style.escape("–"),
        ]
        for row in table.rows
    ]
    headers = [
        "model",
        *(style.escape(name) for name in params),
        "n",
        *(header(column) for column in columns),
        f"fit{separator}s",
    ]
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(
        body,
        headers,
        tablefmt=style.tablefmt,
        disable_numparse=True,
        colalign=align if body else None,
    )


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"


def _records(table: Table) -> Iterable[dict[str, str | float | None]]:
    for row in table.rows:
        record: dict[str, str | float | None] = {
            "dataset": table.dataset,
            "model": row.model,
            "n_seeds": row.n,
        }
        record |= {f"param.{name}": value for name, value in row.params.items()}
        for name, cell in row.cells.items():
            record[name] = cell.mean
            record[f"{name}.std_over_seeds"] = cell.spread
            record[f"{name}.stderr"] = cell.stderr
        yield {**record, "fit_seconds": row.fit_seconds}
