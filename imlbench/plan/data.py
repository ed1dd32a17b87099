"""A job's data: read, checked against what their dataset says, and identified by their hash."""

from __future__ import annotations

import math

from imlbench.api import Examples, Sources, Space, Splits
from imlbench.plan.jobs import Job
from imlbench.plan.registry import Registry


def fingerprint(job: Job, registry: Registry, sources: Sources) -> str:
    """Read a job's data, check that they are what their dataset says, and return their hash.

    Raises:
        DataError: They are missing or damaged.
        Exception: Whatever a plugin raises.
    """
    cls = registry.datasets[job.dataset]
    splits = cls(cls.params_type.model_validate(job.dataset_params)).load(sources)
    check_splits(splits, job.space)
    return splits.fingerprint


def check_splits(splits: Splits, space: Space) -> None:
    """Refuse data that are not what their dataset says.

    Raises:
        TypeError: They are no splits of examples.
        ValueError: Their shape, their values or their hash are others than the contract says.
    """
    if not isinstance(splits, Splits):
        raise TypeError(f"load must return Splits; got {type(splits).__name__}")
    if not (isinstance(splits.fingerprint, str) and splits.fingerprint):
        raise ValueError(f"the fingerprint must be a text; got {splits.fingerprint!r}")
    for name in ("train", "valid", "test"):
        part = getattr(splits, name)
        if not isinstance(part, Examples):
            raise TypeError(f"{name} must be Examples; got {type(part).__name__}")
        if not len(part) or part.stored.shape[1:] != space.event_shape:
            shape, wanted = tuple(part.stored.shape), ("N", *space.event_shape)
            raise ValueError(f"{name} must be of shape {wanted}, N >= 1; got {shape}")
        if part.lengths is not None and sum(part.lengths) != len(part):
            raise ValueError(f"the lengths of {name} must sum to {len(part)}")
        low, high = space.value_range or (-math.inf, math.inf)
        slack = 1e-5 * (high - low) if space.value_range else 0.0
        for x in part.batches(4096):
            if not x.isfinite().all():
                raise ValueError(f"{name} must be finite; some values are NaN or infinite")
            if x.min() < low - slack or x.max() > high + slack:
                found = f"{x.min().item():g} to {x.max().item():g}"
                raise ValueError(f"{name} must be in [{low:g}, {high:g}]; got {found}")
