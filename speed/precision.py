"""Training in bfloat16 beside float32: every model and metric, paired over seeds.

``python -m speed.precision`` runs the jobs, which are reused, and writes ``speed/PRECISION.md``.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).parent
MODELS = {
    "digits": ["iml-gaussian", "iml-gmm", "iml-dpgmm", "vae", "gan", "wgan"],
    "spoken-digits": ["iml-hmm", "iml-rnn", "iml-gmm", "vae"],
    "mnist": ["iml-gmm"],
}
"""The models that are compared on each dataset; the large ones on what shows them best."""
LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """One metric of one model: what bfloat16 changes, with float32 from the same seeds beside.

    Arguments:
        dataset: The dataset.
        model: The model.
        metric: The metric's label, or ``fit_seconds``.
        exact: The values with float32, one for each seed.
        rounded: Those with bfloat16, in the same order.
    """

    dataset: str
    model: str
    metric: str
    exact: tuple[float, ...]
    rounded: tuple[float, ...]

    @property
    def differences(self) -> list[float]:
        """Bfloat16 less float32, one for each seed."""
        return [b - a for a, b in zip(self.exact, self.rounded, strict=True)]

    def interval(self) -> tuple[float, float]:
        """Return mean and half the width of the 95 % interval of the difference, by Student's t."""
        from scipy import stats

        mean, error = _mean_and_error(self.differences)
        return mean, float(stats.t.ppf(1 - LEVEL / 2, len(self.exact) - 1)) * error

    def p_value(self) -> float:
        """Return the probability of such a difference if there is none: a paired t test."""
        from scipy import stats

        mean, error = _mean_and_error(self.differences)
        if error == 0:
            return 1.0 if mean == 0 else 0.0
        return float(2 * stats.t.sf(abs(mean) / error, len(self.exact) - 1))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def differences(frame: pd.DataFrame) -> Iterator[Difference]:
    """Yield what a table of finished jobs tells, one metric of one model at a time.

    Arguments:
        frame: From :meth:`imlbench.Results.to_frame`; seeds that lack a precision do not count.
    """
    for (dataset, model), group in frame[frame.status == "done"].groupby(["dataset", "model"]):
        scores = [
            name.removesuffix(".stderr") for name in map(str, group) if name.endswith(".stderr")
        ]
        for metric in [*scores, "fit_seconds"]:
            both = group.pivot(index="seed", columns="precision", values=metric).dropna()
            if len(both) >= 2 and {"float32", "bfloat16"} <= {*both.columns}:
                exact, rounded = tuple(both["float32"]), tuple(both["bfloat16"])
                yield Difference(str(dataset), str(model), metric, exact, rounded)


def holm(p_values: Sequence[float]) -> list[bool]:
    """Return which of several differences are real, at 5 % for all together (Holm, 1979).

    Example:
        >>> holm([0.04, 0.001, 0.03])
        [False, True, False]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    real = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > LEVEL / (len(p_values) - rank):
            break
        real[index] = True
    return real


def markdown(found: Sequence[Difference], command: str) -> str:
    """Return the page."""
    metrics = [one for one in found if one.metric != "fit_seconds"]
    real = dict(zip(metrics, holm([one.p_value() for one in metrics]), strict=True))
    n_real = sum(real.values())
    lines = [
        "# bfloat16 beside float32",
        "Each model was trained with both precisions from the same seeds; embeddings, likelihoods "
        "and metrics are computed in float32 either way. Given are means over seeds, and the "
        "difference that bfloat16 makes, paired over seeds, with its 95 % interval by Student's t. "
        f"Of {len(metrics)} differences {n_real} are told from zero at 5 % for all together "
        "(paired t tests with Holm's correction); these are marked *. That the others are not does "
        "not show that they are zero: the interval says how large they may be.",
        f"Written by\n\n```sh\n{command}\n```",
        f"{platform.machine()}, {_processor()}. Times are wall times of the fit, beside another "
        "job and whatever else ran.",
    ]
    for dataset in dict.fromkeys(one.dataset for one in found):
        lines += [f"## {dataset}", _table([o for o in found if o.dataset == dataset], real)]
    return "\n\n".join(lines) + "\n"


def _table(found: Sequence[Difference], real: dict[Difference, bool]) -> str:
    rows = ["| model | metric | seeds | float32 | difference | |", "|---|---|---:|---:|---:|---|"]
    for one in found:
        exact = math.fsum(one.exact) / len(one.exact)
        if one.metric == "fit_seconds":
            ratios = [a / b for a, b in zip(one.exact, one.rounded, strict=True)]
            told = f"{math.exp(math.fsum(map(math.log, ratios)) / len(ratios)):.2f} times as fast"
        else:
            mean, half = one.interval()
            told = f"{mean:+.2g} ± {half:.1g}"
        mark = "*" if real.get(one) else ""
        rows.append(
            f"| {one.model} | {one.metric} | {len(one.exact)} | {exact:.5g} | {told} | {mark} |"
        )
    return "\n".join(rows)


def _processor() -> str:
    import torch

    has_units = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return f"bfloat16 {'in hardware' if has_units else 'emulated'}, torch {torch.__version__}"


@click.command()
@click.option("--datasets", default="digits,spoken-digits", show_default=True)
@click.option("--seeds", default="0..4", show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=Path("results/precision"))
def main(datasets: str, seeds: str, workers: int, results: Path) -> None:
    """Run every model with both precisions, and write speed/PRECISION.md."""
    import pandas as pd

    import imlbench

    frames = []
    for dataset in datasets.split(","):
        found = imlbench.run(
            models=MODELS[dataset],
            datasets=dataset,
            grid={"precision": ["float32", "bfloat16"]},
            seeds=seeds,
            path=results,
            workers=workers,
        )
        frames.append(found.to_frame())
    command = f"python -m speed.precision --datasets {datasets} --seeds {seeds} --workers {workers}"
    page = markdown(list(differences(pd.concat(frames))), command)
    (FOLDER / "PRECISION.md").write_text(page, encoding="utf-8")
    click.echo(page)


if __name__ == "__main__":
    main()
