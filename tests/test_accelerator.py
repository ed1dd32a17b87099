"""Every model on a pretend accelerator: its results are the CPU's, and no step of it waits.

The same mistakes are made on a real one, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from imlbench import AnyModel, Dataset, Examples, Sources, Space, Splits
from imlbench.densities.em import LatentDensity
from imlbench.files import read_tensors
from imlbench.plan.config import make_benchmark
from imlbench.plan.data import check_splits
from imlbench.plan.planning import make_plan
from imlbench.plan.registry import Registry
from imlbench.runner.contract import Assignment
from imlbench.runner.job import run_job
from imlbench.testing import SPACES, CheckContext, make_splits
from imlbench_audio.framing import HOP, chunked
from imlbench_iml.autoencoders import fit_autoencoder
from imlbench_iml.invertible import TallLinear
from imlbench_iml.models import IMLGaussian
from imlbench_iml.recurrent import RecurrentMixture
from tests.accelerator import DEVICE, Log, accelerator


def stand_in(dataset: Dataset[Any]) -> Splits:
    """A few examples that are of the dataset's space, and labelled, but random."""
    space, generator = dataset.space, torch.Generator().manual_seed(0)

    def images(n: int) -> Examples:
        low, high = space.value_range
        pixels = torch.randint(256, (n, *space.event_shape), generator=generator)
        labels = {"class": torch.arange(n) % 2}
        return Examples(pixels.byte(), scale=(high - low) / 255, offset=low, labels=labels)

    def recordings(*lengths: int) -> Examples:
        signals = (torch.randn(HOP * (n + 1), generator=generator) for n in lengths)
        return chunked(signals, {"class": range(len(lengths))})

    if space.kind == "image":
        return Splits(images(40), images(20), images(20))
    if dataset.name == "spoken-digits":
        return Splits(recordings(20, 1, 19), recordings(9, 11), recordings(2, 18))
    return Splits(recordings(40), recordings(20), recordings(20))


STAND_INS = {"celeba", "digits", "mnist", "spoken-digits", "violin"}
"""Datasets that need files, or that cannot be made small; the others load themselves."""
SHOWN = {"digits", "toy-2d", "violin"}
"""One dataset of every kind, whose jobs write their artifacts, too."""
SMALL = {
    "epochs": 1,
    "latent_dim": 2,
    "hidden_dim": 16,
    "width": 2,
    "n_components": 2,
    "n_critic": 1,
    "n_dims": 2,
    "n_examples": 20,
    "n_h": 5,
    "n_states": 3,
    "n_steps": 2,
    "n_units": 4,
}
SMALL_DATA = {
    "synth-violin.seconds": 10,
    "toy-2d.shape": "grid",
    "toy-2d.n_train": 40,
    "toy-2d.n_valid": 20,
    "toy-2d.n_test": 20,
}
REGISTRY = Registry()
PAIRS = [
    (model.name, dataset.name)
    for dataset in REGISTRY.datasets.values()
    for model in REGISTRY.models.values()
    if dataset(dataset.params_type()).space.kind in model.kinds
]


@pytest.fixture(scope="module")
def unread():
    """The plan of every model on every dataset, as small as can be."""
    benchmark = make_benchmark(
        None, None, models=["*"], datasets=["*"], n_samples=20, n_draws=1, set=SMALL | SMALL_DATA
    )
    return make_plan(benchmark, REGISTRY)


@pytest.fixture(scope="module")
def data(unread):
    """What datasets load, by their names: once for all jobs, so that none may write into it."""
    found = {}
    for job in unread.data.values():
        cls = REGISTRY.datasets[job.dataset]
        dataset = cls(cls.params_type(**job.dataset_params))
        splits = stand_in(dataset) if cls.name in STAND_INS else dataset.load(Sources())
        check_splits(splits, job.space)
        found[cls.name] = splits
    yield found
    assert all(splits.are_untouched for splits in found.values())


@pytest.fixture
def plan(unread, data, monkeypatch):
    """The plan with its data known; a fit takes few steps, and figures are not drawn."""
    for name, splits in data.items():
        monkeypatch.setattr(REGISTRY.datasets[name], "load", lambda *_, splits=splits: splits)
    monkeypatch.setattr("imlbench.training.MIN_STEPS_PER_EPOCH", 2)
    monkeypatch.setitem(LatentDensity.__init__.__kwdefaults__, "tol", np.inf)  # one step of EM
    monkeypatch.setattr(Figure, "savefig", write_what_is_shown)
    monkeypatch.setattr("imlbench_audio.artifacts.save", write_what_is_shown)
    fingerprints = {key: data[job.dataset].fingerprint for key, job in unread.data.items()}
    return unread.with_fingerprints(fingerprints)


def write_what_is_shown(figure: Figure, path: Path, **options: object) -> None:
    """Write the numbers that a figure shows: a picture would take longer than all the rest."""
    shown = (
        numbers
        for axes in figure.axes
        for numbers in (
            *(image.get_array() for image in axes.images),
            *(line.get_xydata() for line in axes.lines),
            *(points.get_offsets() for points in axes.collections),
        )
    )
    path.write_bytes(b"".join(np.asarray(numbers).tobytes() for numbers in shown))


def test_every_pair_that_is_planned_is_tried(plan):
    assert {(job.model, job.dataset) for job in plan.jobs} == set(PAIRS)
    assert {model for model, _ in PAIRS} == set(REGISTRY.models)
    assert {dataset for _, dataset in PAIRS} == set(REGISTRY.datasets)


@pytest.mark.parametrize(("model", "dataset"), PAIRS)
def test_a_job_comes_out_as_on_the_cpu(plan, tmp_path, model, dataset):
    """To the last bit, but where the device adds up in another order: in its recurrent unit."""
    (job,) = (job for job in plan.jobs if (job.model, job.dataset) == (model, dataset))
    artifacts = plan.artifacts if dataset in SHOWN else ()

    def results(device: str) -> tuple[torch.Tensor, dict[str, float], dict[str, str]]:
        folder = tmp_path / device
        assignment = Assignment(job, folder, plan.metrics, artifacts, Sources(), device=device)
        record = run_job(assignment, REGISTRY)
        samples = read_tensors(assignment.folder.samples(job.draw))["samples"]
        scores = {score.label: score.value for score in record.scores}
        assert not [shown.error for shown in record.artifacts if shown.error]
        files = {
            f"{shown.label}/{name}": file.sha256
            for shown in record.artifacts
            for name, file in shown.files.items()
        }
        return samples, scores, files

    samples, scores, files = results("cpu")
    with accelerator() as log:
        found = results(DEVICE)
    assert log.n_launches > 100
    if model == "iml-rnn":
        torch.testing.assert_close(found[0], samples, rtol=1e-5, atol=1e-5)
        assert found[1] == pytest.approx(scores, rel=1e-5)
        assert found[2].keys() == files.keys()
    else:
        assert torch.equal(found[0], samples)
        assert found[1:] == (scores, files)
    assert scores
    assert bool(files) == bool(artifacts)


def small(cls: type[AnyModel], space: Space, **given: object) -> dict[str, object]:
    """Parameters of a model for data, as small as can be."""
    used = cls.resolve(cls.params_type(**given), space).settings()
    return {name: value for name, value in SMALL.items() if name in used} | given


def trained(cls: type[AnyModel], space: Space, n_steps: int, **given: object) -> Log:
    """Train on the device, twice through as many examples as steps, and return what it did."""
    params = cls.params_type(**small(cls, space, **given, epochs=2))
    context = CheckContext()
    with accelerator() as log:
        context.device = torch.device(DEVICE)
        model = cls(cls.resolve(params, space), space).to(DEVICE)
        splits = make_splits(space, n_steps)
        train, valid = splits.train.to(context.device), splits.valid.to(context.device)
        if isinstance(model, IMLGaussian):  # its other stage takes no steps
            fit_autoencoder(model.autoencoder, model.params, train, context)
        else:
            model.fit(train, valid, context)
    return log


IMAGES = {"image": SPACES["image"], "colours": Space("image", (3, 32, 32), (-1.0, 1.0))}
SPACES_OF = {**IMAGES, "vector": SPACES["vector"]}
TRAINED = [
    *(("iml-gaussian", space, {"latent_dim": 1}) for space in [*SPACES_OF, "sequence"]),
    *(("vae", space, {}) for space in [*SPACES_OF, "sequence"]),
    *(("gan", space, {}) for space in SPACES_OF),
    *(("wgan", space, {}) for space in SPACES_OF),
    *(("wgan", space, {"gradient_penalty": 10.0}) for space in SPACES_OF),
]


@pytest.mark.parametrize(
    ("model", "space", "given"),
    TRAINED,
    ids=["-".join([model, space, *given]) for model, space, given in TRAINED],
)
def test_no_step_of_training_waits(model, space, given):
    """What longer epochs have more waits for, steps wait for; an epoch may, to report its loss."""
    cls, what = REGISTRY.models[model], {**SPACES, **SPACES_OF}[space]
    short, long = (trained(cls, what, n_steps, **given) for n_steps in (2, 6))
    assert dict(long.waits - short.waits) == {}
    assert long.n_launches >= short.n_launches + 2 * 4 * 10


def test_neither_steps_nor_samples_of_the_recurrent_network_wait():
    def fitted(max_iter: int) -> Log:
        with accelerator() as log:
            generator = torch.Generator(DEVICE).manual_seed(0)
            h = torch.randn(12, 2, generator=generator, device=DEVICE)
            rnn = RecurrentMixture(2, 2, n_units=4, max_iter=max_iter)
            rnn.fit(h, generator=generator, lengths=[4, 8])  # looks after 20 and the last step
        return log

    def sampled(n: int) -> Log:
        with accelerator() as log:
            RecurrentMixture(2, 2, n_units=4).to(DEVICE).sample(n, torch.Generator(DEVICE))
        return log

    for called, few, many in ((fitted, 21, 25), (sampled, 3, 9)):
        short, long = called(few), called(many)
        assert dict(long.waits - short.waits) == {}
        assert long.n_launches > short.n_launches


def test_a_factorisation_that_fails_is_nan_and_nobody_waits_to_know():
    with accelerator() as log:
        layer = TallLinear(2, 3).to(DEVICE)
        y = layer(torch.ones(4, 2, device=DEVICE))
        layer.weight.data.zero_()  # the Gram matrix is singular
        log.waits.clear()
        found = layer.inverse(y)
        assert not log.waits
        assert found.isnan().all()


class _Shift(nn.Module):
    """Keeps a tensor that it has not registered as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.ones(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


Step = Callable[[torch.Tensor, torch.Generator], object]
"""A function of a matrix (3, 2) on the device, and of a generator there."""

MISTAKES: dict[str, Step] = {
    "noise made on the CPU": lambda x, g: x + torch.randn(x.shape),
    "the device's generator on the CPU": lambda x, g: torch.randn(x.shape, generator=g),
    "the CPU's generator on the device": lambda x, g: torch.randn(
        x.shape, generator=torch.Generator(), device=x.device
    ),
    "a method with the CPU's generator": lambda x, g: x.clone().normal_(
        generator=torch.Generator()
    ),
    "constants made on the CPU": lambda x, g: x * torch.tensor([1.0, 2.0]),
    "a matrix made on the CPU": lambda x, g: x @ torch.eye(2),
    "a layer that was not moved": lambda x, g: nn.Linear(2, 1)(x),
    "a tensor that is no buffer": lambda x, g: _Shift().to(x.device)(x),
    "joined with the CPU": lambda x, g: torch.cat([x, torch.ones(1, 2)]),
    "written into the CPU": lambda x, g: torch.zeros(3, 2).add_(x),
    "indices of the wrong device": lambda x, g: torch.zeros(5)[x.argmax(1)],
    "a target on the CPU": lambda x, g: nn.functional.mse_loss(x, torch.zeros(3, 2)),
    ".numpy()": lambda x, g: x.numpy(),
    "numpy.asarray": lambda x, g: np.asarray(x),
}
WAITS: dict[str, Step] = {
    ".item()": lambda x, g: x.sum().item(),
    "float()": lambda x, g: float(x.sum()),
    "if": lambda x, g: 1 if x.isnan().any() else 0,
    ".tolist()": lambda x, g: x.tolist(),
    ".cpu()": lambda x, g: x.cpu(),
    "a constant moved to the device": lambda x, g: torch.tensor(0.5, device=x.device),
    "a mask as an index": lambda x, g: x[x > 0],
    "a mask as an index, backwards": lambda x, g: x.requires_grad_()[x > 0].sum().backward(),
    "assignment where a mask is": lambda x, g: x.__setitem__(x[:, 0] > 0, x[0]),
    "a list as an index": lambda x, g: x[[0, 2]],
    "indices on the CPU": lambda x, g: x[torch.tensor([0, 2])],
    "a scalar as an index": lambda x, g: x[x.argmax() // 2],
    "cholesky": lambda x, g: torch.linalg.cholesky(torch.eye(2, device=x.device)),
    "eigh": lambda x, g: torch.linalg.eigh(x.T @ x),
    "equal": lambda x, g: torch.equal(x, x + 1),
    "unique": lambda x, g: x.unique(),
    "bincount": lambda x, g: x.argmax(1).bincount(),
    "one draw": lambda x, g: torch.multinomial(x.exp(), 1, generator=g),
}
NO_WAITS: dict[str, Step] = {
    "a number": lambda x, g: x * 2.0 + torch.tensor(1.0),
    "where": lambda x, g: torch.where(x > 0, x, 0.0).sum() / (x > 0).sum(),
    "masked_fill": lambda x, g: x.masked_fill(x > 0, 0.0),
    "assignment of a number where a mask is": lambda x, g: x.__setitem__(x > 0, 0.0),
    "indices": lambda x, g: x[x.argmax(0)],
    "constants": lambda x, g: torch.full((2,), 0.5, device=x.device),
    "noise": lambda x, g: torch.randn(x.shape, generator=g, device=x.device) + x,
    "many draws": lambda x, g: torch.multinomial(x.exp(), 5, replacement=True, generator=g),
    "cholesky_ex": lambda x, g: torch.linalg.cholesky_ex(x.T @ x).L,
    "cholesky_inverse": lambda x, g: torch.cholesky_inverse(torch.eye(2, device=x.device)),
    "searchsorted": lambda x, g: torch.searchsorted(x[:, 0].sort().values, x[0]),
    "a step": lambda x, g: _step(nn.Linear(2, 1, device=x.device), x),
}


def _step(layer: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(x).square().mean().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()


@pytest.fixture(params=[DEVICE, pytest.param("cuda", marks=pytest.mark.gpu)])
def waits(request):
    """Carry out a step on a device, and return whether the host had to wait."""

    def on_simulated(step: Step) -> bool:
        with accelerator() as log:
            x, generator = inputs(DEVICE)
            log.waits.clear()
            step(x, generator)
        return bool(log.waits)

    def on_cuda(step: Step) -> bool:
        x, generator = inputs("cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(x, generator)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def inputs(device: str) -> tuple[torch.Tensor, torch.Generator]:
        x = torch.tensor([[0.5, -1.0], [2.0, 0.0], [-0.5, 1.5]]).to(device)
        return x, torch.Generator(device).manual_seed(0)

    return on_cuda if request.param == "cuda" else on_simulated


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_about_devices_is_an_error(waits, mistake):
    with pytest.raises((RuntimeError, TypeError), match="device"):
        waits(MISTAKES[mistake])


@pytest.mark.parametrize("step", WAITS)
def test_what_the_host_waits_for_is_counted(waits, step):
    assert waits(WAITS[step])


@pytest.mark.parametrize("step", NO_WAITS)
def test_nothing_else_is_counted(waits, step):
    assert not waits(NO_WAITS[step])


def test_a_wait_is_told_with_its_line():
    with accelerator() as log:
        x = torch.ones(3, device=DEVICE)
        x.sum().item()
    ((where, count),) = log.waits.items()
    assert count == 1
    assert where.startswith("_local_scalar_dense, test_accelerator.py:")
    assert where.endswith("in test_a_wait_is_told_with_its_line")


def test_a_device_may_lack_float64():
    with accelerator(float64=False):
        x = torch.ones(3, device=DEVICE)
        with pytest.raises(TypeError, match="no float64"):
            x.double()
        with pytest.raises(TypeError, match="no float64"):
            torch.zeros(3, dtype=torch.float64).to(DEVICE)


def test_outside_of_the_block_there_is_no_device():
    generator = torch.Generator
    with accelerator():
        x = torch.ones(3, device=DEVICE)
    assert torch.Generator is generator
    with pytest.raises(NotImplementedError):
        x + 1
