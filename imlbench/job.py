"""The spine: run one job in this process. Load, fit, sample, score, draw.

Each step leaves its result in the job's folder and is not repeated if it is there: a metric that
fails never costs a training run, and a new metric needs no new samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from imlbench import __version__
from imlbench.api import Evaluation, FitContext, Metric, Model, Score, Sources, Splits
from imlbench.errors import DataError, Diverged
from imlbench.plan import Job
from imlbench.registry import Registry
from imlbench.store import JobFolder, read_tensors, write_json, write_tensors

logger = logging.getLogger("imlbench")

Report = Callable[[dict[str, Any]], None]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random states inside the block, and restore them after it."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - for plugins that use the global state
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


def derive_seed(seed: int, purpose: str) -> int:
    """Return a 63-bit seed that depends on both arguments alone."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class JobContext(FitContext):
    """The context of one job: generators, learning curves, and the cache of fitted stages.

    Arguments:
        job: The job.
        device: Where to compute.
        stages: The folder of the cache.
        report: Called with every event.
        refit_before: Stages that were fitted before this time are fitted again.
    """

    def __init__(
        self,
        job: Job,
        device: torch.device,
        stages: Path,
        report: Report,
        refit_before: float = 0.0,
    ) -> None:
        self.device, self.seed = device, job.seed
        self._identity = {"code": job.code[0], "data": job.fingerprint, "seed": job.seed}
        self._stages, self._report, self._refit_before = stages, report, refit_before
        self.history: list[dict[str, Any]] = []
        self.seconds_reused = 0.0
        self.seconds_waited = 0.0

    def generator(self, purpose: str, device: torch.device | str | None = None) -> torch.Generator:
        generator = torch.Generator(device or self.device)
        return generator.manual_seed(derive_seed(self.seed, purpose))

    def report(self, stage: str, step: int, n_steps: int, **values: float) -> None:
        record = {"stage": stage, "step": step, "n_steps": n_steps, "values": values}
        for name, value in values.items():
            if not math.isfinite(value):
                raise Diverged(stage, step, f"{name} is {value}")
        self.history.append(record)
        self._report({"event": "progress", **record})

    def _load_stage(self, facts: Path, tensors: Path, module: nn.Module) -> bool:
        """Load a stage that is there, whole, and not to be fitted again."""
        if not facts.exists() or facts.stat().st_mtime < self._refit_before:
            return False
        try:
            saved = json.loads(facts.read_text(encoding="utf-8"))
            module.load_state_dict(read_tensors(tensors))
        except Exception:  # whatever is wrong with the files, fitting again mends it
            logger.exception("the stage in %s cannot be read and is fitted again", tensors)
            return False
        self.history += saved["history"]
        self.seconds_reused += saved["seconds"]
        return True

    def fit_once(
        self, stage: str, module: nn.Module, settings: Mapping[str, Any], fit: Callable[[], None]
    ) -> None:
        key = json.dumps({"stage": stage, **self._identity, "settings": settings}, sort_keys=True)
        name = f"{stage}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self._stages.mkdir(parents=True, exist_ok=True)
        facts, tensors = self._stages / f"{name}.json", self._stages / f"{name}.safetensors"
        waiting = time.perf_counter()
        with FileLock(self._stages / f"{name}.lock"):
            self.seconds_waited += time.perf_counter() - waiting
            if self._load_stage(facts, tensors, module):
                return
            start, n_records = time.perf_counter(), len(self.history)
            fit()
            seconds = time.perf_counter() - start
            write_tensors(tensors, module.state_dict())
            history = self.history[n_records:]
            write_json(facts, {"key": json.loads(key), "seconds": seconds, "history": history})


def run_job(
    job: Job,
    folder: JobFolder,
    registry: Registry,
    *,
    metrics: Mapping[str, str],
    stages: Path,
    sources: Sources,
    device: torch.device,
    report: Report = lambda event: None,
    refit_before: float = 0.0,
) -> None:
    """Bring a job's folder up to date: whatever is missing is computed.

    Arguments:
        job: The job.
        folder: Its folder.
        registry: Where its model and dataset are.
        metrics: Names of metrics, and their code, by which a score is known to be up to date.
        stages: The folder of shared stages.
        sources: Where the data are.
        device: Where to compute.
        report: Called with every event.
        refit_before: Stages that were fitted before this time are fitted again.

    Raises:
        Diverged: Training failed numerically.
        DataError: The data are missing or damaged.
        Exception: Whatever a plugin raises.
    """
    model_cls, dataset_cls = registry.models[job.model], registry.datasets[job.dataset]
    dataset = dataset_cls(dataset_cls.Params(**job.dataset_params))
    report({"event": "step", "step": "load"})
    splits = dataset.load(sources)
    if splits.fingerprint != job.fingerprint:
        raise DataError(f"dataset {job.dataset}: its files changed during the run. Run again.")
    with seeded(derive_seed(job.seed, "initialisation")):
        model = model_cls(model_cls.Params(**job.model_params), dataset.space).to(device)
    if not folder.read("fit.json"):
        report({"event": "step", "step": "fit"})
        context = JobContext(job, device, stages, report, refit_before)
        _fit(model, splits, context, folder)
    model.load_state_dict(read_tensors(folder.path / "checkpoint.safetensors"))
    model.eval().requires_grad_(False)
    report({"event": "step", "step": "sample"})
    samples = _samples(job, model, folder, device)
    evaluation = Evaluation(dataset, splits, samples, model, device)
    report({"event": "step", "step": "score"})
    _score(evaluation, [(registry.metrics[name](), metrics[name]) for name in metrics], folder)
    _draw(evaluation, folder)


def _fit(model: Model, splits: Splits, context: JobContext, folder: JobFolder) -> None:
    device = context.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    train, valid = splits.train.to(device), splits.valid.to(device)
    start = time.perf_counter()
    with seeded(derive_seed(context.seed, "fit")):
        model.train()
        model.fit(train, valid, context)
    seconds = time.perf_counter() - start - context.seconds_waited
    write_tensors(folder.path / "checkpoint.safetensors", model.state_dict())
    folder.write(
        "fit.json",
        {
            "seconds": seconds + context.seconds_reused,
            "seconds_reused": context.seconds_reused,
            "peak_memory_bytes": _peak_memory(device),
            "n_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "fingerprint": splits.fingerprint,
            "n_train": len(splits.train),
            "environment": environment(device),
            "history": context.history,
        },
    )


def _peak_memory(device: torch.device) -> int:
    """Peak of the device's memory, or of this process's if it is the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):  # ru_maxrss would include the parent's peak on Linux
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(device: torch.device) -> dict[str, str]:
    """Return what a reader needs to know about the machine and the software."""
    cuda = device.type == "cuda"
    return {
        "version": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "machine": f"{platform.system()} {platform.machine()}",
        "n_threads": str(torch.get_num_threads()),
    }


def git_commit() -> str:
    """Return the commit of this code, with ``+`` if it was changed; empty if it is not in git."""
    here = Path(__file__)
    for command in (
        ["git", "ls-files", "--error-unmatch", here.name],
        ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--match="],
    ):
        try:
            answer = subprocess.run(
                command, cwd=here.parent, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if answer.returncode:
            return ""
    return answer.stdout.strip()


def _samples(job: Job, model: Model, folder: JobFolder, device: torch.device) -> Tensor:
    path = folder.path / "samples.safetensors"
    if path.exists():
        return read_tensors(path)["samples"]
    draws = []
    for draw in range(job.n_draws):
        seed = derive_seed(job.seed, f"samples {draw}")
        generator = torch.Generator(device).manual_seed(seed)
        with seeded(seed), torch.no_grad():
            draws.append(model.sample(job.n_samples, generator).to("cpu", torch.float32))
        expected = (job.n_samples, *model.space.event_shape)
        if draws[-1].shape != expected:
            raise TypeError(f"{job.model}.sample must return {expected}; got {draws[-1].shape}")
    samples = torch.stack(draws)
    if not samples.isfinite().all():
        raise Diverged("samples", 1, "some are NaN or infinite")
    write_tensors(path, {"samples": samples})
    return samples


def _score(
    evaluation: Evaluation, metrics: Sequence[tuple[Metric, str]], folder: JobFolder
) -> None:
    """Compute the metrics that are missing or outdated; one that fails does not lose the others."""
    scores = folder.scores()
    not_applicable: dict[str, str] = {}
    failures: list[tuple[str, Exception]] = []
    for metric, code in metrics:
        reason = _why_not(metric, evaluation)
        if reason:
            not_applicable[metric.name] = reason
        elif scores.get(metric.name, {}).get("code") != code:
            try:
                with seeded(0), torch.no_grad():
                    score = metric.compute(evaluation)
                scores[metric.name] = {**_record(metric, score, folder), "code": code}
            except Exception as error:  # a metric is somebody else's code
                logger.exception("metric %s failed", metric.name)
                failures.append((metric.name, error))
    folder.write("metrics.json", {"scores": scores, "not_applicable": not_applicable})
    if failures:
        names = ", ".join(name for name, _ in failures)
        first = failures[0][1]
        raise RuntimeError(f"metric {names} failed: {first}") from first


def _why_not(metric: Metric, evaluation: Evaluation) -> str:
    kind = evaluation.dataset.space.kind
    if kind not in metric.kinds:
        return f"not for {kind} data"
    for owner, what, needs in (
        (evaluation.model, "model", metric.requires),
        (evaluation.dataset, "dataset", metric.requires_of_dataset),
    ):
        missing = sorted(need for need in needs if not owner.can(need))
        if missing:
            return f"the {what} has no {', '.join(missing)}"
    return ""


def _record(metric: Metric, score: Score, folder: JobFolder) -> dict[str, Any]:
    if not math.isfinite(score.value):
        raise ValueError(f"{metric.name} must be finite; got {score.value}")
    if score.per_example is not None:
        path = folder.path / "scores" / f"{metric.name}.safetensors"
        write_tensors(path, {"per_example": score.per_example})
    return {
        "value": score.value,
        "stderr": score.stderr,
        "settings": score.settings,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
    }


def _draw(evaluation: Evaluation, folder: JobFolder) -> None:
    """Draw the figures; a picture that fails costs a line in the log, not the job."""
    figures = folder.path / "figures"
    if figures.exists():
        return
    from imlbench.report.figures import draw_figures

    try:
        with (
            seeded(0),
            torch.no_grad(),
            tempfile.TemporaryDirectory(dir=folder.path, prefix=".writing-") as temporary,
        ):
            draw_figures(evaluation, Path(temporary) / "figures")
            (Path(temporary) / "figures").rename(figures)
    except Exception:  # it may call a plugin's methods
        logger.exception("figures failed")
