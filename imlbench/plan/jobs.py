"""What a plan is made of: jobs, what is computed for each, and what is skipped. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from imlbench.api.space import Space
from imlbench.plan.identity import digest
from imlbench.plan.settings import Settings, assignments


@dataclass(frozen=True)
class Codes:
    """What identifies the code that a job's results depend on; see :mod:`imlbench.plan.identity`.

    Arguments:
        fit: The model, and how the harness fits.
        draw: How the harness draws samples.
        score: The dataset, and how the harness computes scores.
    """

    fit: str
    draw: str
    score: str


@dataclass(frozen=True)
class Job:
    """One (model, dataset, parameters, seed).

    Its identity is a chain: what determines the fit, what determines the samples besides, and what
    determines a score besides. Each has a key, so that a change redoes what depends on it.

    Arguments:
        model: The model's name.
        family: The model's family.
        dataset: The dataset's name.
        model_params: Resolved parameters, as JSON values; those that do not apply are absent.
        dataset_params: Likewise.
        seed: The only seed.
        n_samples: Samples per draw.
        n_draws: Number of draws.
        space: What one example is.
        codes: What identifies the code.
        shipped_by: The distributions of the model and of the dataset, with their versions.
        changed: The parameters that are not at their default.
        varying: The parameters that tell this job from others of its plan.
        fingerprint: Hash of the data; empty until they have been read.
    """

    model: str
    family: str
    dataset: str
    model_params: Settings
    dataset_params: Settings
    seed: int
    n_samples: int
    n_draws: int
    space: Space
    codes: Codes
    shipped_by: tuple[str, str] = ("", "")
    changed: Settings = field(default_factory=dict)
    varying: Settings = field(default_factory=dict)
    fingerprint: str = ""

    @cached_property
    def fit_key(self) -> str:
        """What identifies the fitted model."""
        data = [self.dataset, self.fingerprint, repr(self.space)]
        return digest("fit", self.model, self.model_params, self.seed, data, self.codes.fit)

    @cached_property
    def draw_key(self) -> str:
        """What identifies the samples."""
        return digest("draw", self.fit_key, self.n_draws, self.n_samples, self.codes.draw)

    @property
    def draw(self) -> str:
        """How samples were drawn, as it names files: such as ``5x1000``."""
        return f"{self.n_draws}x{self.n_samples}"

    @property
    def id(self) -> str:
        """The name of the job's folder: readable, and unique to the fit."""
        return f"{self.dataset}-{self.model}-{self.fit_key[:12]}"

    @property
    def data(self) -> str:
        """What identifies the data, before they are read."""
        return json.dumps([self.dataset, self.dataset_params], sort_keys=True)

    def __str__(self) -> str:
        return ", ".join([f"{self.model} on {self.dataset}", *assignments(self.varying)]) + (
            f", seed {self.seed}"
        )


@dataclass(frozen=True)
class Task:
    """A metric or an artifact with its parameters.

    Arguments:
        name: Its name.
        params: All of its parameters, as JSON values.
        changed: Those that are not at their default.
        code: What identifies its code.
        needs_samples: Whether it depends on samples, or on the fitted model alone.
    """

    name: str
    params: Settings
    changed: Settings
    code: str
    needs_samples: bool

    @cached_property
    def label(self) -> str:
        """The name, with the parameters that are not at their default: ``kde[h=0.1]``."""
        return f"{self.name}[{', '.join(assignments(self.changed))}]" if self.changed else self.name

    def key(self, job: Job) -> str:
        """Return what identifies the result for a job."""
        return self._key(job, job.draw_key if self.needs_samples else job.fit_key)

    def reason_key(self, job: Job) -> str:
        """Return what identifies the answer to whether it applies, which samples do not change."""
        return self._key(job, job.fit_key)

    def _key(self, job: Job, basis: str) -> str:
        return digest("score", basis, self._what, job.codes.score)

    @cached_property
    def _what(self) -> str:
        return digest(self.name, self.params, self.code)


@dataclass(frozen=True)
class Skip:
    """A pair that is not run, and why.

    Arguments:
        model: The model's name.
        dataset: The dataset's name.
        reason: Why.
        is_failure: Whether a plugin failed, rather than not being made for the data.
    """

    model: str
    dataset: str
    reason: str
    is_failure: bool = False

    def __str__(self) -> str:
        return f"{self.model} on {self.dataset}: {self.reason}"


@dataclass(frozen=True)
class Variant:
    """Jobs that differ in nothing but the seed.

    Arguments:
        job: The job of the first seed.
        seeds: All seeds.
    """

    job: Job
    seeds: tuple[int, ...]

    @property
    def jobs(self) -> Iterator[Job]:
        """The jobs, one for each seed."""
        return (replace(self.job, seed=seed) for seed in self.seeds)


@dataclass(frozen=True)
class Plan:
    """What is to run, what is computed for each job, and the pairs that are skipped.

    Arguments:
        benchmark: The name of the benchmark; empty for one from the command line.
        variants: The jobs; while nobody looks at them, ten thousand seeds take no room.
        skips: The pairs that are not run.
        metrics: What is computed for each job.
        artifacts: What is drawn and written for each job.
    """

    benchmark: str
    variants: tuple[Variant, ...]
    skips: tuple[Skip, ...]
    metrics: tuple[Task, ...]
    artifacts: tuple[Task, ...]

    def __len__(self) -> int:
        return sum(len(variant.seeds) for variant in self.variants)

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        """All jobs, each once: other parameters of a dataset may lead to the same data."""
        jobs = [job for variant in self.variants for job in variant.jobs]
        return tuple(
            {(job.id, job.fingerprint or job.data, job.draw): job for job in jobs}.values()
        )

    @property
    def data(self) -> dict[str, Job]:
        """The data that the jobs need: one job of each, by what identifies them."""
        return {variant.job.data: variant.job for variant in reversed(self.variants)}

    def with_fingerprints(
        self, found: Mapping[str, str], failed: Mapping[str, str] = MappingProxyType({})
    ) -> Plan:
        """Return the plan with the hashes of its data, and without the jobs whose data failed.

        Arguments:
            found: Hashes, by what identifies the data.
            failed: Why a dataset could not be loaded, likewise.
        """
        variants, skips = [], list(self.skips)
        for variant in self.variants:
            job = variant.job
            if job.data in found:
                known = replace(job, fingerprint=found[job.data])
                variants.append(replace(variant, job=known))
            else:
                reason = f"the data cannot be loaded ({failed[job.data]})"
                skips.append(Skip(job.model, job.dataset, reason, True))
        return replace(self, variants=tuple(variants), skips=tuple(dict.fromkeys(skips)))
