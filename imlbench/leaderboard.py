"""From MLflow's runs to tables: per dataset, a row for each model with its parameters."""

from __future__ import annotations

import html
import json
import math
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import pandas as pd
from tabulate import tabulate

from imlbench.errors import UserError, unknown

Published = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Published values by dataset, metric, and label of the row."""

Format = Literal["terminal", "github", "latex", "html", "csv", "json"]

NOTE = (
    "± is the standard deviation over n seeds; (…) is the standard error over test examples, "
    "shown where n = 1."
)


@dataclass(frozen=True)
class Cell:
    """One metric of one row.

    Arguments:
        mean: Mean over seeds.
        spread: Standard deviation over seeds (n - 1 in the denominator); ``None`` for one seed.
        stderr: Standard error over test examples, if there is one seed; otherwise ``None``.
    """

    mean: float
    spread: float | None = None
    stderr: float | None = None

    def __str__(self) -> str:
        """Two significant digits of the uncertainty decide how many decimals are shown.

        Example:
            >>> str(Cell(190.234, spread=0.4321)), str(Cell(10.62, stderr=0.051))
            ('190.23 ±0.43', '10.620 (0.051)')
        """
        uncertainty = self.stderr if self.spread is None else self.spread
        if not uncertainty:
            text = f"{self.mean:.5g}"
            return text if self.spread is None else f"{text} ±0"
        decimals = min(max(0, 1 - math.floor(math.log10(uncertainty))), 6)
        mean, size = f"{self.mean:.{decimals}f}", f"{uncertainty:.{decimals}f}"
        return f"{mean} ({size})" if self.spread is None else f"{mean} ±{size}"


@dataclass(frozen=True)
class Row:
    """One model with one set of parameters on one dataset; or, with n = 0, a published value."""

    model: str
    params: dict[str, str]
    n: int
    cells: dict[str, Cell]
    fit_seconds: float | None


@dataclass(frozen=True)
class Column:
    """One metric: its name, unit, and direction."""

    name: str
    unit: str
    higher_is_better: bool | None

    @property
    def arrow(self) -> str:
        """The direction in which it is better, if there is one."""
        return {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]


@dataclass(frozen=True)
class Table:
    """The leaderboard of one dataset.

    Arguments:
        dataset: Its name, with parameters and fingerprint where tables must be told apart.
        rows: Best first.
        columns: The metrics.
        notes: What the reader must know: jobs without a result, settings of metrics, the machine.
    """

    dataset: str
    rows: list[Row]
    columns: list[Column]
    notes: list[str]

    def best(self, column: Column) -> float | None:
        """Return the best mean of a column, or ``None`` if there is nothing to compare."""
        ours = [row for row in self.rows if row.n]
        means = [row.cells[column.name].mean for row in ours if column.name in row.cells]
        if len(means) < 2 or column.higher_is_better is None:
            return None
        return max(means) if column.higher_is_better else min(means)

    def varying_params(self) -> list[str]:
        """Return the parameters that differ between rows of one model."""
        seen: dict[str, dict[str, set[str]]] = {}
        for row in self.rows:
            for name, value in row.params.items():
                seen.setdefault(row.model, {}).setdefault(name, set()).add(value)
        varying = [n for params in seen.values() for n, values in params.items() if len(values) > 1]
        return list(dict.fromkeys(varying))


def make_tables(
    runs: pd.DataFrame,
    *,
    jobs: Iterable[str] | None = None,
    models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    metrics: Sequence[str] = (),
    sort: str | None = None,
    published: Published | None = None,
) -> list[Table]:
    """Aggregate runs over seeds.

    Arguments:
        runs: As :meth:`Tracker.runs` returns them, the newest first. Of rows that differ only in
            the code that made them, the newest is shown.
        jobs: Only these jobs, by id.
        models: Only these, by name or glob.
        datasets: Only these, by name or glob.
        metrics: Only these columns, by name or glob, in this order.
        sort: The metric that orders the rows; by default the first column.
        published: Values from the literature, to stand beside ours.

    Raises:
        UserError: No finished run is left, or a name is unknown.
    """
    if len(runs) and jobs is not None:
        runs = runs[runs["tags.imlbench.job"].isin(list(jobs))]
    for key, patterns in (("model", models), ("dataset", datasets)):
        if len(runs) and patterns:
            runs = runs[_matching(runs[f"tags.imlbench.{key}"], key, patterns)]
    if not len(runs) or not _has_scores(runs).any():
        raise UserError(
            "leaderboard: there must be at least one finished run; got none. "
            "Run some first, for example: imlbench run --models iml,vae --datasets digits"
        )
    _check_metrics(runs, [*metrics, *([sort] if sort else [])])
    fingerprints = runs.groupby("tags.imlbench.dataset")["tags.imlbench.fingerprint"].nunique()
    tables = []
    for _, group in runs.groupby(_dataset_keys(runs), sort=True, dropna=False):
        name = str(group["tags.imlbench.dataset"].iloc[0])
        if fingerprints[name] > 1:
            name = f"{name} ({_dataset_label(group)})"
        theirs = (published or {}).get(str(group["tags.imlbench.dataset"].iloc[0]), {})
        tables.append(_make_table(name, group, metrics, sort, theirs))
    return [table for table in tables if table.columns or not metrics]


def _has_scores(runs: pd.DataFrame) -> pd.Series[bool]:
    """Runs with scores are ranked even if a metric or a later scoring failed; the notes tell."""
    return ~runs["tags.imlbench.scores"].isin(["{}"])


def _check_metrics(runs: pd.DataFrame, patterns: Sequence[str]) -> None:
    names = {name for text in runs["tags.imlbench.scores"].dropna() for name in json.loads(text)}
    missing = [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
    if missing:
        raise UserError(*(f"leaderboard: {unknown('metric', m, names)}" for m in missing))


def _matching(values: pd.Series[str], what: str, patterns: Sequence[str]) -> pd.Series[bool]:
    chosen = {v for v in values for pattern in patterns if fnmatchcase(v, pattern)}
    missing = [p for p in patterns if not any(fnmatchcase(v, p) for v in values)]
    if missing:
        raise UserError(*(f"leaderboard: {unknown(what, m, set(values))}" for m in missing))
    return values.isin(chosen)


def _dataset_keys(runs: pd.DataFrame) -> list[str]:
    return ["tags.imlbench.dataset", "tags.imlbench.fingerprint"]


def _dataset_label(group: pd.DataFrame) -> str:
    first = group.iloc[0]
    params = [
        f"{column.removeprefix('params.dataset.')}={first[column]}"
        for column in group.columns
        if column.startswith("params.dataset.") and isinstance(first[column], str)
    ]
    return ", ".join([*params, f"data {first['tags.imlbench.fingerprint'][:6]}"])


def _make_table(
    dataset: str,
    group: pd.DataFrame,
    metrics: Sequence[str],
    sort: str | None,
    published: Mapping[str, Mapping[str, float]],
) -> Table:
    done = group[_has_scores(group)]
    columns = _columns(done, metrics)
    params = [c for c in group.columns if c.startswith("params.model.")]
    sampling = ["params.n_samples", "params.n_draws"]
    rows = [
        _make_row(runs[runs["tags.imlbench.code"] == newest], params + sampling, columns)
        for _, runs in done.groupby(["tags.imlbench.model", *params, *sampling], dropna=False)
        for newest in runs["tags.imlbench.code"].iloc[:1]
    ]
    for label in dict.fromkeys(label for values in published.values() for label in values):
        values = {name: Cell(v[label]) for name, v in published.items() if label in v}
        if any(column.name in values for column in columns):
            rows.append(Row(label, {}, 0, values, None))
    order = columns[0] if columns else None
    if sort is not None:
        order = next((column for column in columns if column.name == sort), order)
    if order is not None:
        sign = -1 if order.higher_is_better else 1
        rows.sort(
            key=lambda row: (
                sign * row.cells[order.name].mean if order.name in row.cells else math.inf
            )
        )
    return Table(dataset, rows, columns, _notes(group, columns))


def _make_row(runs: pd.DataFrame, params: list[str], columns: Sequence[Column]) -> Row:
    first = runs.iloc[0]
    cells = {}
    for column in columns:
        values = runs[f"metrics.{column.name}"].dropna()
        if len(values) == 1 and len(runs) == 1:
            stderr = first.get(f"metrics.{column.name}.stderr", math.nan)
            cells[column.name] = Cell(
                float(values.iloc[0]), stderr=None if math.isnan(stderr) else float(stderr)
            )
        elif len(values) == 1:  # the metric is there for one of several seeds
            cells[column.name] = Cell(float(values.iloc[0]))
        elif len(values):
            cells[column.name] = Cell(float(values.mean()), spread=float(values.std(ddof=1)))
    named = {
        name.removeprefix("params.").removeprefix("model."): str(first[name])
        for name in params
        if isinstance(first[name], str) and first[name] != "None"
    }
    seconds = float(runs["metrics.fit_seconds"].mean())
    return Row(str(first["tags.imlbench.model"]), named, len(runs), cells, seconds)


def _columns(done: pd.DataFrame, metrics: Sequence[str]) -> list[Column]:
    facts: dict[str, dict[str, Any]] = {}
    for text in done["tags.imlbench.scores"]:
        facts |= json.loads(text)
    names = list(facts)
    if metrics:
        names = list(dict.fromkeys(n for p in metrics for n in names if fnmatchcase(n, p)))
    return [Column(name, facts[name]["unit"], facts[name]["higher_is_better"]) for name in names]


def _notes(group: pd.DataFrame, columns: Sequence[Column]) -> list[str]:
    done = group[_has_scores(group)]
    notes = _settings(done, columns)
    for _, run in group[group["tags.imlbench.status"] != "done"].iterrows():
        what = f"{run['tags.imlbench.model']}, seed {run['tags.imlbench.seed']}"
        reason = run.get("tags.imlbench.reason")
        because = f" ({reason.splitlines()[0]})" if isinstance(reason, str) and reason else ""
        lack = "Not complete" if run["tags.imlbench.scores"] != "{}" else "No result"
        notes.append(f"{lack}: {what}: {run['tags.imlbench.status']}{because}.")
    return [*notes, *_provenance(done)]


def _settings(done: pd.DataFrame, columns: Sequence[Column]) -> list[str]:
    """Say what the numbers depend on; metrics and models with the same settings share a line.

    Real numbers, such as bandwidths that suit the validation split, are told by their range.
    """
    metrics_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for column in columns:
        groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for model, text in zip(
            done["tags.imlbench.model"], done["tags.imlbench.scores"], strict=True
        ):
            settings = json.loads(text).get(column.name, {}).get("settings", {})
            fixed = {k: None if isinstance(v, float) else v for k, v in settings.items()}
            if settings:
                groups.setdefault(json.dumps(fixed), []).append((model, settings))
        for members in groups.values():
            models = tuple(dict.fromkeys(model for model, _ in members))
            first = members[0][1]
            told = [f"{key} = {_range([found[key] for _, found in members])}" for key in first]
            which = models if len(groups) > 1 else ()
            metrics_of.setdefault((", ".join(told), which), []).append(column.name)
    return [
        f"{', '.join(names)}{' of ' if which else ''}{', '.join(which)}: {label}."
        for (label, which), names in metrics_of.items()
    ]


def _range(values: Sequence[Any]) -> str:
    """Return the one value there is, or the least and the greatest of real numbers."""
    if len(set(map(str, values))) == 1:
        return str(values[0])
    return f"{min(values):g} to {max(values):g}"


def _provenance(done: pd.DataFrame) -> list[str]:
    """Say with what, where and from which seeds the numbers came."""

    def values(name: str) -> str:
        column = f"tags.imlbench.{name}"
        found = list(done[column].dropna().unique()) if column in done else []
        return ", ".join(sorted(map(str, found))) or "unknown"

    if not len(done):
        return []
    commit = values("git_commit")
    return [
        f"Seeds {values('seed')}. Run by imlbench {values('version')}"
        f"{'' if commit == 'unknown' else f' (commit {commit})'}, torch {values('torch')}, "
        f"on {values('device')} ({values('machine')}, threads: {values('n_threads')})."
    ]


@dataclass(frozen=True)
class _Style:
    tablefmt: str
    bold: Callable[[str], str]
    escape: Callable[[str], str] = lambda text: text
    title: Callable[[str], str] = lambda text: text


def _escape_latex(text: str) -> str:
    for plain, escaped in {
        "_": r"\_",
        "±": r"$\pm$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
    }.items():
        text = text.replace(plain, escaped)
    return text.replace("%", r"\%").replace("–", "--").replace("…", r"\ldots")


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
        frame = pd.DataFrame([record for table in tables for record in _records(table)])
        if format == "csv":
            return frame.to_csv(index=False).rstrip("\n")
        return json.dumps(json.loads(frame.to_json(orient="records")), indent=2)
    width = shutil.get_terminal_size().columns if width is None else width
    style = _STYLES["plain" if format == "terminal" and not width else format]
    limit = width if format == "terminal" else 0
    return "\n\n".join(_render(table, style, limit, format) for table in tables)


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
    if format == "terminal" and not width and table.rows:
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


def _records(table: Table) -> Iterable[dict[str, Any]]:
    for row in table.rows:
        record: dict[str, Any] = {"dataset": table.dataset, "model": row.model, "n_seeds": row.n}
        record |= {f"param.{name}": value for name, value in row.params.items()}
        for name, cell in row.cells.items():
            record[name] = cell.mean
            record[f"{name}.std_over_seeds"] = cell.spread
            record[f"{name}.stderr"] = cell.stderr
        yield {**record, "fit_seconds": row.fit_seconds}
