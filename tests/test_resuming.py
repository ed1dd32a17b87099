"""A fit that is ended and goes on gives, bit by bit, what one without interruption gives."""

from __future__ import annotations

import logging
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator

from imlbench import Diverged, Model, Params
from imlbench.plan.registry import Registry
from imlbench.runner.resuming import Checkpoints, _sealed, read
from imlbench.runner.seeding import seeded
from imlbench.testing import (
    SPACES,
    CheckContext,
    Interrupted,
    ResumableContext,
    check_model,
    make_splits,
)
from imlbench.training import OneCycleAdam, train_epochs
from imlbench_gan.gan import GAN, WGAN

QUICK = {
    "epochs": 3,
    "hidden_dim": 16,
    "width": 4,
    "n_components": 2,
    "n_examples": 60,
    "n_dims": 2,
    "n_states": 3,
}
LOOPS = {"vae", "gan", "wgan", "iml-gaussian", "iml-gmm", "iml-dpgmm", "iml-hmm", "iml-rnn"}
PAIRS = [
    pytest.param(
        cls,
        kind,
        {"latent_dim": 1} if kind == "vector" else {"latent_dim": 2},
        # Half a minute each; smaller images show the same of these networks' loops.
        marks=[pytest.mark.slow] if kind == "large-image" and cls.family == "gan" else [],
    )
    for cls in Registry().models.values()
    for kind in SPACES
    if SPACES[kind].kind in cls.kinds
]
OPTIONS = [
    (WGAN, "image", {"n_critic": 3}),  # 50 steps an epoch end between the generator's
    (WGAN, "vector", {"n_critic": 3, "gradient_penalty": 10.0}),
]


def make(cls, kind: str, params):
    space, given = SPACES[kind], {**QUICK, **params}
    if cls.name == "iml-rnn":
        given["n_steps"] = 40
    known = {name: value for name, value in given.items() if name in cls.params_type.model_fields}
    return cls(cls.resolve(cls.params_type(**known), space), space).train()


def fit(cls, kind: str, params, context):
    """Fit a new model as the harness does; return its state."""
    splits = make_splits(SPACES[kind])
    with seeded(3):
        model = make(cls, kind, params)
        model.fit(splits.train, splits.valid, context)
    return model.state_dict()


def stops(n_reports: int) -> list[int]:
    """Where fits are ended, one after the other."""
    return sorted({1, 2, n_reports - 1} & set(range(1, n_reports)))


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) for name in one if one[name].numel()
    )


class Counting(ResumableContext):
    """Counts what is reported in this attempt."""

    n_reports = 0

    def report(self, *arguments, **values):
        super().report(*arguments, **values)
        self.n_reports += 1


@pytest.mark.parametrize(
    ("cls", "kind", "params"),
    PAIRS + OPTIONS,
    ids=lambda value: getattr(value, "name", value) if not isinstance(value, dict) else "",
)
def test_a_fit_that_goes_on_is_one_without_interruption(cls, kind, params, tmp_path):
    undisturbed = CheckContext(3)
    expected = fit(cls, kind, params, undisturbed)
    n_reports = len(undisturbed.history)
    for stop_at in stops(n_reports):
        with pytest.raises(Interrupted):
            fit(cls, kind, params, ResumableContext(3, tmp_path, stop_at=stop_at))
    resumed = Counting(3, tmp_path)
    assert same(fit(cls, kind, params, resumed), expected)
    assert resumed.history == undisturbed.history
    assert resumed.facts == undisturbed.facts
    if cls.name in LOOPS | {"reference-kmeans"}:
        assert resumed.n_reports <= n_reports - 2  # at most the last epoch, and a density's fit


class Everything(Model[Params]):
    """Draws from every source of randomness there is; loops twice under one name."""

    name = "everything"

    def __init__(self, params, space):
        super().__init__(params, space)
        self.weight = torch.nn.Parameter(torch.zeros(8))
        self.dropout = torch.nn.Dropout()

    def fit(self, train, valid, context):
        own = Generator().manual_seed(5)
        for rate in (0.1, 0.2):
            optimizer = OneCycleAdam(self.parameters(), rate, 5)
            drawn = context.generator(f"noise {rate}")
            for epoch in context.steps("twice", 5, self, optimizer, own):
                target = torch.tensor(
                    [
                        torch.rand((), generator=drawn).item(),
                        torch.rand((), generator=own).item(),
                        torch.rand((), generator=context.generator("fresh")).item(),
                        torch.rand(()).item(),
                        np.random.rand(),  # noqa: NPY002
                        np.random.randn(),  # noqa: NPY002
                        random.random(),
                        random.gauss(0, 1),
                    ]
                )
                loss = (self.dropout(self.weight) - target).square().sum()
                optimizer.step(loss)
                context.report("twice", epoch, 5, loss=loss.item())
                context.record(**{f"epoch {epoch} at rate {rate}": loss.item()})

    def sample(self, n, generator):
        return torch.randn(n, *self.space.event_shape, generator=generator)


@pytest.mark.parametrize("stop_at", range(1, 10))
def test_every_source_of_randomness_goes_on(stop_at, tmp_path):
    undisturbed = CheckContext(3)
    expected = fit(Everything, "vector", {}, undisturbed)
    with pytest.raises(Interrupted):
        fit(Everything, "vector", {}, ResumableContext(3, tmp_path, stop_at=stop_at))
    resumed = Counting(3, tmp_path)
    assert same(fit(Everything, "vector", {}, resumed), expected)
    assert resumed.history == undisturbed.history
    assert resumed.facts == undisturbed.facts
    assert resumed.n_reports == 10 - stop_at


def interrupted(folder: Path, cls=Everything, kind: str = "vector", stop_at: int = 3) -> Path:
    with pytest.raises(Interrupted):
        fit(cls, kind, {}, ResumableContext(3, folder, stop_at=stop_at))
    (path,) = folder.iterdir()
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_model(path: Path) -> None:
    other = interrupted(path.parent / "other", GAN, stop_at=5)
    other.replace(path)


def with_other_parts(path: Path) -> None:
    """Everything loads but the last part: what was loaded before it must be undone."""
    change(path, lambda saved: saved["state"]["parts"].pop())


def without_a_generator(path: Path) -> None:
    change(path, lambda saved: saved["state"]["generators"].popitem())


def beyond_the_end(path: Path) -> None:
    change(path, lambda saved: saved.update(step=6))


def change(path: Path, edit) -> None:
    saved = read(path)
    edit(saved)
    path.write_bytes(_sealed(saved))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        empty,
        of_another_model,
        with_other_parts,
        without_a_generator,
        beyond_the_end,
    ],
)
def test_a_file_that_is_damaged_or_foreign_is_not_used(damage, tmp_path, caplog):
    path = interrupted(tmp_path / "it")
    damage(path)
    undisturbed, resumed = CheckContext(3), Counting(3, tmp_path / "it")
    expected = fit(Everything, "vector", {}, undisturbed)
    with caplog.at_level(logging.WARNING, logger="imlbench"):
        assert same(fit(Everything, "vector", {}, resumed), expected)
    assert "is not used" in caplog.text
    assert resumed.history == undisturbed.history
    assert resumed.n_reports == 10


def test_nothing_in_a_file_is_executed(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = interrupted(tmp_path / "it")
    change(path, lambda saved: saved.update(used=Malicious()))
    resumed = Counting(3, tmp_path / "it")
    fit(Everything, "vector", {}, resumed)
    assert resumed.n_reports == 10
    assert not (tmp_path / "executed").exists()


def test_the_patience_with_a_failure_goes_on(tmp_path):
    class Constant(GAN):
        def _step_generator(self, n, noise, optimizer):
            for parameter in self.generator.parameters():
                parameter.data.zero_()

    params = {"epochs": 99, "batch_size": 2}
    for stop_at in (15, 31):  # two reports an epoch
        with pytest.raises(Interrupted):
            fit(Constant, "image", params, ResumableContext(3, tmp_path, stop_at=stop_at))
    with pytest.raises(Diverged, match=r"epoch 20: .* of the data's, for 20 epochs"):
        fit(Constant, "image", params, ResumableContext(3, tmp_path))


class Counter:
    """A part that counts steps."""

    def __init__(self) -> None:
        self.n = 0

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state_dict):
        self.n = state_dict["n"]


class Clock:
    """Every step of a loop takes a second."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(checkpoints: Checkpoints, clock: Clock, n_steps: int, *, until: int = 99, stage="loop"):
    """Run a loop; return the steps that were done, and the files' times of writing."""
    counter, done, written = Counter(), [], []
    for step in checkpoints.steps(stage, n_steps, [counter]):
        written.append(_content(checkpoints))
        if step > until:
            break
        counter.n += 1
        clock.now += 1
        done.append(step)
    else:
        assert counter.n == n_steps
        written.append(_content(checkpoints))
    return done, [at for at, (a, b) in enumerate(pairwise(written), done[:1][0]) if a != b]


def _content(checkpoints: Checkpoints) -> list[bytes]:
    return [path.read_bytes() for path in sorted(checkpoints._folder.glob("*"))]


@pytest.mark.parametrize(
    ("interval", "n_steps", "written"),
    [
        (0, 4, [1, 2, 3, 4]),
        (3, 9, [3, 6, 9]),
        (3, 10, [3, 6, 9, 10]),  # the end, since the loop was long enough
        (11, 10, []),  # a short loop costs nothing
        (float("inf"), 10, []),
    ],
)
def test_when_states_are_kept(interval, n_steps, written, tmp_path):
    clock, folder = Clock(), tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, interval, [], {}, clock=clock)
    assert run(checkpoints, clock, n_steps) == (list(range(1, n_steps + 1)), written)
    assert folder.exists() == bool(written)


def test_an_interval_of_zero_keeps_the_next_step(tmp_path):
    clock = Clock()
    checkpoints = Checkpoints(tmp_path, 100, [], {}, clock=clock)
    counter = Counter()
    for step in checkpoints.steps("loop", 9, [counter]):
        if step == 5:
            assert not list(tmp_path.iterdir())
            checkpoints.interval = 0
        if step == 6:
            break
    (path,) = tmp_path.iterdir()
    assert read(path)["step"] == 5


def test_a_short_loop_is_not_written_whatever_took_long_before(tmp_path):
    clock = Clock()
    checkpoints = Checkpoints(tmp_path, 5, [], {}, clock=clock)
    clock.now += 1000
    assert run(checkpoints, clock, 4)[1] == []


def test_a_finished_loop_is_left_out_and_clear_removes_it(tmp_path):
    clock, folder = Clock(), tmp_path / "checkpoints"
    first = Checkpoints(folder, 2, [], {}, clock=clock)
    run(first, clock, 5, stage="one")
    run(first, clock, 9, stage="two", until=4)
    again = Checkpoints(folder, 2, [], {}, clock=clock)
    assert list(again.steps("one", 5, [Counter()])) == []
    assert run(again, clock, 9, stage="two")[0] == [5, 6, 7, 8, 9]
    again.clear()
    assert not folder.exists()
    assert run(Checkpoints(folder, 2, [], {}), clock, 5, stage="one")[0] == [1, 2, 3, 4, 5]


def test_time_is_that_of_a_fit_without_interruption(tmp_path):
    clock = Clock()
    first = Checkpoints(tmp_path, 3, [], {}, clock=clock)
    run(first, clock, 10, until=8)  # two steps were not kept
    clock.now += 500
    second = Checkpoints(tmp_path, 3, [], {}, clock=clock)
    start = clock.now
    clock.now += 7  # until the loop begins again
    run(second, clock, 10, until=9)
    assert clock.now - start + second.seconds_before == 9
    third, start = Checkpoints(tmp_path, 3, [], {}, clock=clock), clock.now
    run(third, clock, 10)
    assert clock.now - start + third.seconds_before == 10


def test_older_files_are_not_used_where_a_fit_is_repeated(tmp_path):
    clock = Clock()
    run(Checkpoints(tmp_path, 0, [], {}, clock=clock), clock, 9, until=4)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime
    same_time = Checkpoints(tmp_path, 99, [], {}, not_before=written)
    later = Checkpoints(tmp_path, 99, [], {}, not_before=written + 1)
    assert run(same_time, clock, 9, until=6)[0] == [5, 6]
    assert run(later, clock, 9, until=6)[0] == [1, 2, 3, 4, 5, 6]


def test_a_loop_goes_on_whether_an_earlier_stage_is_fitted_or_found(tmp_path):
    """The stage that is found asks for no generator; its reports come from the cache."""
    reports = CheckContext()
    reports.report("stage", 1, 1, loss=1.0)

    def loop(is_found: bool) -> tuple[list[int], list[float]]:
        curves, steps, values = [], [], []
        checkpoints = Checkpoints(tmp_path, 0, curves, {})
        if not is_found:
            checkpoints.tracked("stage", Generator().manual_seed(1))
        curves += reports.history
        noise = checkpoints.tracked("noise", Generator().manual_seed(2))
        for step in checkpoints.steps("stage", 6, [Counter()]):
            if len(steps) == 3:
                break
            steps.append(step)
            values.append(torch.rand((), generator=noise).item())
        return steps, values

    expected = torch.rand(6, generator=Generator().manual_seed(2)).tolist()
    assert loop(is_found=False) == ([1, 2, 3], expected[:3])
    assert loop(is_found=True) == ([4, 5, 6], expected[3:])


def test_a_loop_after_a_stage_that_is_found_is_not_taken_for_the_stage_s_own(tmp_path):
    """Both have one name, as those of a network that is trained, cached, and trained on."""
    first = CheckContext()
    checkpoints = Checkpoints(tmp_path, 0, first.history, {})
    for step in checkpoints.steps("network", 3, [Counter()]):
        first.report("network", step, 3, loss=1.0)
    curves = []
    again = Checkpoints(tmp_path, 0, curves, {})
    curves += first.history  # as the cache brings them back
    assert list(again.steps("network", 3, [Counter()])) == [1, 2, 3]


def test_what_a_job_did_before_a_shared_stage_stays_its_own(tmp_path):
    """Another job of the same stage goes on with it, and with nothing else."""

    def fit_stage(name: str, until: int) -> CheckContext:
        job = CheckContext()
        job.report(name, 1, 1, loss=0.5)
        job.record(model=name, batch_size=None)
        for step in Checkpoints(tmp_path, 0, job.history, job.facts).steps("net", 4, [Counter()]):
            if step > until:
                break
            job.report("net", step, 4, loss=float(step))
            job.record(batch_size=7)
        return job

    fit_stage("one", until=2)
    other = fit_stage("two", until=4)
    assert [point.stage for point in other.history] == ["two"] + 4 * ["net"]
    assert [point.step for point in other.history] == [1, 1, 2, 3, 4]
    assert other.facts == {"model": "two", "batch_size": 7}


def test_loops_that_report_nothing_are_told_apart_by_their_order(tmp_path):
    def loops(n: int) -> list[list[int]]:
        checkpoints = Checkpoints(tmp_path, 0, [], {})
        return [list(checkpoints.steps("loop", 3, [Counter()])) for _ in range(n)]

    assert loops(1) == [[1, 2, 3]]
    assert loops(2) == [[], [1, 2, 3]]


def test_a_loop_that_names_no_parts_begins_at_one_and_writes_nothing(tmp_path):
    for _ in range(2):
        assert list(Checkpoints(tmp_path, 0, [], {}).steps("loop", 3, [])) == [1, 2, 3]
    assert not list(tmp_path.iterdir())


def test_a_fit_goes_on_without_a_place_to_write_to(tmp_path, caplog):
    folder = tmp_path / "file"
    folder.write_text("in the way")
    assert run_all(Checkpoints(folder, 0, [], {})) == [1, 2, 3]
    assert "step 1 is not kept" in caplog.text


def run_all(checkpoints: Checkpoints) -> list[int]:
    return list(checkpoints.steps("loop", 3, [Counter()]))


class _Momentum(Model[Params]):
    """Learns a mean by gradient descent with momentum."""

    name = "momentum"

    def __init__(self, params, space):
        super().__init__(params, space)
        self.mean = torch.nn.Parameter(torch.zeros(space.event_shape))

    def parts(self, optimizer):
        return [self, optimizer]

    def fit(self, train, valid, context):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

        def step(rows):
            loss = (train[rows] - self.mean).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"loss": loss}

        train_epochs(
            step,
            train,
            n_epochs=4,
            batch_size=2,
            context=context,
            stage="mean",
            parts=self.parts(optimizer),
        )

    def sample(self, n, generator):
        return self.mean + torch.randn(n, *self.space.event_shape, generator=generator)


class _ForgetsTheOptimizer(_Momentum):
    def parts(self, optimizer):
        return [self]


class _NamesNothing(_Momentum):
    def parts(self, optimizer):
        return []


class _Unreadable(_Momentum):
    """Its state is an array, which only pickle reads."""

    def parts(self, optimizer):
        part = Counter()
        part.n = np.zeros(3)
        return [self, optimizer, part]


class _Unseeded(_Momentum):
    """Begins anywhere."""

    def __init__(self, params, space):
        super().__init__(params, space)
        self.mean.data = torch.rand(space.event_shape, generator=_ANY)


_ANY = Generator().manual_seed(0)


@pytest.mark.parametrize("cls", [_Momentum, _NamesNothing, Everything])
def test_the_check_lets_pass_what_goes_on_or_begins_again(cls):
    check_model(cls, SPACES["vector"])


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (_ForgetsTheOptimizer, "interrupted must go on to the model of one that was not"),
        (_Unreadable, "must be made of tensors, numbers and strings"),
        (_Unseeded, "the same seed must give the same model"),
    ],
)
def test_the_check_finds_what_does_not_go_on(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_model(cls, SPACES["vector"])
