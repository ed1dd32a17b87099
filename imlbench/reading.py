"""Results from Python: look at them, load fitted models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imlbench.errors import UserError, unknown
from imlbench.records.folder import Store
from imlbench.records.record import Record, Status
from imlbench.records.tables import Entry, Published, Table, entries, make_tables

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from imlbench.api.model import AnyModel
    from imlbench.records.render import Format

Place = str | os.PathLike[str]
Names = str | Sequence[str]


class Leaderboard:
    """Tables, one for each dataset; a notebook shows them as such.

    Arguments:
        tables: From :func:`~imlbench.records.tables.make_tables`.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tables

    def render(self, format: Format = "terminal", *, width: int | None = None) -> str:
        """Return the tables as text.

        Arguments:
            format: One of ``terminal``, ``github``, ``latex``, ``html``, ``csv``, ``json``.
            width: Columns of a terminal; zero for no limit and no control sequences.
        """
        from imlbench.records.render import render

        return render(self.tables, format, width=width)

    def __str__(self) -> str:
        return self.render(width=0)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.render("html")


class Results:
    """What jobs have left behind.

    Arguments:
        found: Records, each with a way in which samples were drawn.
        store: The folder they come from; ``None`` if they come from a server.
        published: Values from the literature.
        damaged: Jobs whose records cannot be read.
    """

    def __init__(
        self,
        found: Sequence[Entry],
        store: Store | None,
        published: Published | None = None,
        damaged: Sequence[str] = (),
    ) -> None:
        self._entries, self._store, self._published = tuple(found), store, published
        self.damaged = tuple(damaged)

    @property
    def records(self) -> tuple[Record, ...]:
        """The records, one for each job."""
        return tuple({entry.record.id: entry.record for entry in self._entries}.values())

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __repr__(self) -> str:
        n_done = sum(record.status is Status.DONE for record in self)
        return f"Results({len(self)} jobs, {n_done} done)"

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each job and way of drawing.

        Columns: what identifies the job, its parameters by their names, how it ended, every metric
        by its label with its ``stderr``, seconds, memory, and number of parameters.
        """
        import pandas as pd

        return pd.DataFrame([_flat(entry) for entry in self._entries])

    def leaderboard(
        self,
        *,
        models: Names = (),
        datasets: Names = (),
        metrics: Names = (),
        sort: str | None = None,
    ) -> Leaderboard:
        """Return a table for each dataset, with a row for each model and set of parameters.

        Arguments:
            models: Only these, by name, family or glob.
            datasets: Only these, by name or glob.
            metrics: Only these columns, by label or glob.
            sort: The metric that orders the rows; by default the first column.

        Raises:
            UserError: There is no result, or a name is unknown.
        """
        tables = make_tables(
            self._entries,
            models=names_of(models),
            datasets=names_of(datasets),
            metrics=names_of(metrics),
            sort=sort,
            published=self._published,
        )
        return Leaderboard(tables)

    def load(self, record: Record, *, device: torch.device | str = "cpu") -> AnyModel:
        """Return the fitted model of one of these jobs; see :func:`imlbench.load`."""
        if self._store is None:
            raise UserError(f"job {record.id}: its model is not on the server; load its folder.")
        return load(record, self._store.root, device=device)

    def per_example(self, record: Record, label: str, draw: str = "") -> dict[str, torch.Tensor]:
        """Return a metric's values for every test example: ``per_example``, and perhaps ``groups``.

        Arguments:
            record: One of these records.
            label: The metric's label, such as ``kde``.
            draw: How the samples were drawn; by default as the last ones were.

        Raises:
            UserError: There are none.
        """
        score = record.score(label, draw or next(reversed(record.draws), ""))
        if self._store is None or score is None or score.file is None:
            labels = [found.label for found in record.scores if found.n_examples]
            raise UserError(f"job {record.id}: {unknown('per-example metric', label, labels)}")
        folder = self._store.folder(record.id)
        return folder.load(folder.per_example(label, score.draw), score.file)


def names_of(given: Names) -> tuple[str, ...]:
    """Return names that are given as a list, or separated by commas."""
    parts = given.split(",") if isinstance(given, str) else given
    return tuple(name.strip() for name in parts if name.strip())


def _flat(entry: Entry) -> dict[str, object]:
    record = entry.record
    row: dict[str, object] = {
        "job": record.id,
        "model": record.model,
        "dataset": record.dataset,
        "seed": record.seed,
        **entry.params,
        **{f"{record.dataset}.{name}": value for name, value in record.dataset_params.items()},
        "status": str(record.status),
    }
    for score in entry.scores.values():
        row |= {score.label: score.value, f"{score.label}.stderr": score.stderr}
    if record.fit:
        row |= {
            "fit_seconds": record.fit.seconds,
            "peak_memory_bytes": record.fit.peak_memory_bytes,
            "n_parameters": record.fit.n_parameters,
        }
    return row


def results(
    path: Place = "results", *, tracking: str | None = None, config: Place | None = None
) -> Results:
    """Return what was run so far.

    Arguments:
        path: The results folder.
        tracking: An MLflow server to read from instead of the folder.
        config: The file of published values; by default ``benchmarks.toml``.

    Raises:
        UserError: There is no such folder, or the server cannot be read.
    """
    published = published_values(config)
    if tracking is not None:
        from imlbench.records.tracking import read_records

        return Results(entries(read_records(tracking)), None, published)
    root = Path(path)
    if not root.is_dir():
        raise UserError(
            f"--results: {root} must be a folder with results; there is none. "
            "Run some first, for example: imlbench run --models iml,vae --datasets digits"
        )
    store = Store(root)
    return Results(entries(store.records()), store, published, store.damaged())


def load(
    job: Record | str, path: Place = "results", *, device: torch.device | str = "cpu"
) -> AnyModel:
    """Return a job's fitted model, ready to sample, encode, decode or evaluate.

    Arguments:
        job: The job's record, or the name of its folder.
        path: The results folder.
        device: Where it goes.

    Raises:
        UserError: There is no such job, it has no fitted model, or its plugin is not installed.

    Example::

        model = imlbench.load("digits-iml-gmm-0a1b2c3d4e5f")
        x = model.sample(10, torch.Generator().manual_seed(0))
    """
    import torch

    from imlbench.plan.registry import Registry
    from imlbench.runner.job import open_model

    store = Store(Path(path))
    name = job if isinstance(job, str) else job.id
    record = store.folder(name).read()
    if record is None:
        known = [folder.path.name for folder in store]
        raise UserError(f"--results: {store.root}: {unknown('job', name, known)}")
    if record.fit is None or not store.folder(name).checkpoint.exists():
        raise UserError(
            f"job {name}: must have a fitted model; it is {record.status} and has no checkpoint. "
            "Run it again first."
        )
    registry = Registry()
    for what, wanted, known_names in (
        ("model", record.model, registry.models),
        ("dataset", record.dataset, registry.datasets),
    ):
        if wanted not in known_names:
            raise UserError(f"job {name}: {unknown(what, wanted, known_names)}")
    try:
        return open_model(record, store.folder(name), registry, torch.device(device))
    except UserError:
        raise
    except Exception as error:  # a plugin, or a file, can be wrong in any way
        raise UserError(
            f"job {name}: its checkpoint must fit today's code; got {type(error).__name__}: "
            f"{error}. Run it again, or install the version that it was made by."
        ) from error


def published_values(config: Place | None) -> Published | None:
    """Return the values from the literature that the file of benchmarks names; ``None`` if none."""
    from imlbench.plan.config import find_file, read_file

    file = find_file(Path(config) if config else None)
    return read_file(file).published if file else None
