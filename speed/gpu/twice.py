"""The same jobs twice on a device, and their models on the device and on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import Tensor

import imlbench
from imlbench import AnyModel, Autoencoding, Sources
from imlbench.api.capabilities import members
from imlbench.plan.registry import Registry
from imlbench.records.folder import Store
from imlbench.records.record import Record, Status
from imlbench.testing import LOG_DENSITIES
from speed.gpu.setup import Setup

FULL: dict[str, Any] = {
    "models": ["iml", "vae", "gan"],
    "datasets": ["digits", "celeba", "synth-violin"],
    "n_draws": 2,
    "set": {
        "epochs": 2,
        "celeba.size": 32,
        "synth-violin.seconds": 60,
        "width": 16,
        "n_states": 20,
    },
}
QUICK: dict[str, Any] = {
    "models": ["iml-gaussian"],
    "datasets": ["digits"],
    "n_samples": 20,
    "n_draws": 1,
    "set": {"epochs": 1, "latent_dim": 2},
}
HEADERS = (
    "dataset",
    "model",
    "same checkpoint",
    "same samples",
    "same scores",
    "device less CPU, at most",
    "peak memory, MiB",
)


def run(setup: Setup) -> list[str]:
    """Run the jobs in two folders."""
    problems = []
    for folder in _folders(setup):
        found = imlbench.run(
            **(QUICK if setup.quick else FULL), path=folder, device=str(setup.device), workers=4
        )
        problems += [f"{r.id}: {r.reason}" for r in found if r.status is not Status.DONE]
    return problems


def show(setup: Setup) -> str:
    """Return a table of the jobs that were done twice."""
    first, second = (
        {record.id: record for record in Store(folder).records() if record.status is Status.DONE}
        for folder in _folders(setup)
    )
    rows = [
        [
            first[name].dataset,
            first[name].model,
            *("yes" if same else "NO" for same in same_results(first[name], second[name])),
            "; ".join(differences(first[name], _folders(setup)[0], setup.device)) or "–",
            f"{_peak(first[name]) / 2**20:.0f}",
        ]
        for name in sorted(first.keys() & second.keys())
    ]
    table = tabulate(rows, HEADERS, "github", disable_numparse=True)
    return f"{table}\n\nThe checkpoint of a job was read on both, and given the same test examples."


def _folders(setup: Setup) -> tuple[Path, Path]:
    return setup.results / "first", setup.results / "second"


def same_results(one: Record, other: Record) -> tuple[bool, bool, bool]:
    """Return whether two jobs have the same checkpoint, the same samples, and the same scores."""
    assert one.fit is not None
    assert other.fit is not None
    samples, scores = [], []
    for record in (one, other):
        samples.append({name: drawn.file.sha256 for name, drawn in record.draws.items()})
        scores.append({score.label: score.value for score in record.scores})
    is_same_fit = one.fit.checkpoint.sha256 == other.fit.checkpoint.sha256
    return is_same_fit, samples[0] == samples[1], scores[0] == scores[1]


def differences(record: Record, results: Path, device: torch.device) -> Iterator[str]:
    """Yield how far what a model computes on a device is from what it computes on the CPU."""
    cls = Registry().datasets[record.dataset]
    splits = cls(cls.params_type.model_validate(record.dataset_params)).load(Sources())
    x = splits.test[:200]
    computed = []
    for where in (device, torch.device("cpu")):
        model = imlbench.load(record, results, device=where)
        with torch.no_grad():
            computed.append(dict(compute(model, x.to(where))))
    for name, found in computed[0].items():
        yield f"{name} {float((found.cpu() - computed[1][name].cpu()).abs().max()):.1e}"


def compute(model: AnyModel, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what a model says of examples, by the name of the method."""
    if model.can(Autoencoding):
        autoencoder = cast(Autoencoding, model)
        h = autoencoder.encode(x)
        yield "encode", h
        yield "decode", autoencoder.decode(h)
    for capability in LOG_DENSITIES:
        if model.can(capability):
            (name,) = members(capability)
            yield name, getattr(model, name)(x)


def _peak(record: Record) -> int:
    return record.fit.peak_memory_bytes if record.fit else 0
