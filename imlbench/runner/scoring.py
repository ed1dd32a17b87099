"""How the harness computes a score: what it depends on besides the metric's own code."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from imlbench.api.artifact import AnyArtifact
from imlbench.api.capabilities import members
from imlbench.api.metric import AnyMetric, Evaluation, Score
from imlbench.runner.seeding import seeded
from imlbench.runner.values import as_json


def why_not(plugin: AnyMetric | AnyArtifact, evaluation: Evaluation) -> str:
    """Return why a metric or an artifact does not apply; empty if it does."""
    kind = evaluation.dataset.space.kind
    if kind not in plugin.kinds:
        return f"not for {kind} data"
    for owner, what, needs in (
        (evaluation.model, "model", plugin.requires),
        (evaluation.dataset, "dataset", plugin.requires_of_dataset),
    ):
        missing = [n for need in needs for n in members(need) if not hasattr(owner, n)]
        if missing:
            return f"the {what} has no {', '.join(missing)}"
    return ""


def score(metric: AnyMetric, evaluation: Evaluation) -> Score:
    """Compute a metric, and refuse what is no score.

    Raises:
        TypeError: It is no :class:`Score`.
        ValueError: The value is not finite, or the per-example values are of another shape.
    """
    seen = evaluation if metric.needs_samples else replace(evaluation, draws=None)
    with seeded(0), torch.no_grad():
        found = metric.compute(seen)
    if not isinstance(found, Score):
        raise TypeError(f"{metric.name} must return a Score; got {type(found).__name__}")
    value = float(found.value)
    stderr = None if found.stderr is None else float(found.stderr)
    if not math.isfinite(value) or not math.isfinite(stderr or 0.0):
        raise ValueError(f"{metric.name} must be finite; got {value} with error {stderr}")
    settings = {str(name): _scalar(setting) for name, setting in found.settings.items()}
    return replace(
        found, value=value, stderr=stderr, settings=settings, **_checked(metric.name, found)
    )


def _scalar(setting: object) -> float | int | str:
    plain = as_json(setting)
    if not isinstance(plain, float | int | str):
        raise TypeError(f"a score's settings must be numbers and texts; got {plain!r}")
    return plain


def _checked(name: str, found: Score) -> dict[str, Tensor | None]:
    """Return per-example values and groups in the form that is stored."""
    values, groups = found.per_example, found.groups
    if values is not None:
        values = torch.as_tensor(values).detach().to("cpu", torch.float64)
        if values.ndim != 1 or not len(values):
            raise ValueError(f"{name} must give one value per example; got {tuple(values.shape)}")
        if values.isnan().any():
            raise ValueError(f"{name} must give numbers for all examples; some are NaN")
    if groups is not None:
        groups = torch.as_tensor(groups).detach().to("cpu", torch.int64)
        if values is None or groups.shape != values.shape:
            raise ValueError(f"{name} must give one group for each per-example value")
    return {"per_example": values, "groups": groups}
