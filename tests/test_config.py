"""From TOML and the command line to jobs; every mistake is told, and all of them at once."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from imlbench import (
    Dataset,
    Metric,
    Model,
    Params,
    Score,
    Sources,
    Space,
    UserError,
    hookimpl,
)
from imlbench.plan.config import find_file, make_benchmark
from imlbench.plan.describe import describe_one
from imlbench.plan.planning import make_plan
from imlbench.plan.registry import Registry
from tests.plans import identify_data

TOML = """
[defaults]
seeds = "0..1"
set = { "iml-gmm" = { n_components = 10 } }

[benchmarks.small]
models = ["iml", "vae"]
datasets = ["digits"]
set = { epochs = 3, "vae.learning_rate" = 0.01 }
grid = { latent_dim = [2, 4] }
"""


ADDRESS = '"vae.learning_rate" = 0.01'


@pytest.fixture(params=[ADDRESS, ADDRESS.replace('"', ""), "vae = { learning_rate = 0.01 }"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    file = tmp_path / "benchmarks.toml"
    file.write_text(TOML.replace(ADDRESS, request.param))
    return file


def plan_of(registry, *args, **kwargs):
    return make_plan(make_benchmark(*args, **kwargs), registry)


def errors_of(registry, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        plan_of(registry, *args, **kwargs)
    return "\n".join(caught.value.messages)


def test_a_named_benchmark_expands_to_jobs(registry, path):
    jobs = plan_of(registry, "small", path, models=["iml-gmm", "vae"]).jobs
    assert len(jobs) == 2 * 2 * 2  # models, latent_dim, seeds
    assert {job.model_params["latent_dim"] for job in jobs} == {2, 4}
    assert {job.model_params["epochs"] for job in jobs} == {3}
    assert {j.model_params["learning_rate"] for j in jobs if j.model == "vae"} == {0.01}
    assert {j.model_params["n_components"] for j in jobs if j.model == "iml-gmm"} == {10}
    assert len({job.id for job in jobs}) == len(jobs)


def test_the_command_line_wins(registry, path):
    given = {"seeds": "5", "settings": ["epochs=7", "vae.latent_dim=3"], "models": ["vae"]}
    (job,) = plan_of(registry, "small", path, **given).jobs
    assert (job.seed, job.model_params["epochs"], job.model_params["latent_dim"]) == (5, 7, 3)


def test_job_ids_depend_on_everything_that_matters_and_nothing_else(registry):
    def ids(*settings: str, seeds: str = "0") -> list[str]:
        given = {"models": ["vae"], "datasets": ["digits"], "settings": settings, "seeds": seeds}
        plan = identify_data(plan_of(registry, None, None, **given), registry, Sources())
        return [job.id for job in plan.jobs]

    assert ids() == ids("latent_dim=20")  # the default, written out
    assert ids() == ids("width=7")  # does not apply to small images
    assert ids() == ids("digits.valid_size=200")  # the same data
    assert len({*ids(), *ids("latent_dim=21"), *ids(seeds="1"), *ids("digits.valid_size=100")}) == 4
    assert len(ids("digits.valid_size=100,200")) == 2


@pytest.mark.parametrize("address", ['"vae." = 1', '".epochs" = 1'])
def test_half_an_address_is_refused(registry, tmp_path, address):
    file = tmp_path / "benchmarks.toml"
    file.write_text(TOML.replace(ADDRESS, address))
    assert "must be parameter or plugin.parameter" in errors_of(registry, "small", file)


def test_values_in_brackets_are_one_value(registry):
    given = {"models": ["vae"], "datasets": ["mnist"], "settings": ["mnist.classes=[0,1],[7]"]}
    jobs = plan_of(registry, None, None, **given).jobs
    assert [job.dataset_params["classes"] for job in jobs] == [[0, 1], [7]]


def test_defaults_follow_the_data(registry):
    given = {"models": ["iml-gmm"], "datasets": ["digits", "mnist"]}
    by_data = {job.dataset: job.model_params for job in plan_of(registry, None, None, **given).jobs}
    assert (by_data["digits"]["hidden_dim"], by_data["mnist"]["hidden_dim"]) == (64, 600)


def test_every_mistake_of_a_file_is_told_at_once(registry, tmp_path):
    file = tmp_path / "benchmarks.toml"
    file.write_text('[benchmarks.a]\nseeds = [-1]\nmodel = ["vae"]\n[benchmark.b]\n')
    told = errors_of(registry, "a", file)
    assert "[benchmarks.a] seeds.0: must be greater than or equal to 0; got -1" in told
    assert "[benchmarks.a]: unknown key 'model'. Did you mean 'models'?" in told
    assert "unknown key 'benchmark'. Did you mean 'benchmarks'?" in told
    assert told.count(str(file)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[defaults\n", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
        (None, "cannot be"),
    ],
)
def test_an_unreadable_file_is_one_message(registry, tmp_path, content, message):
    file = tmp_path / "benchmarks.toml"
    if content is not None:
        file.write_bytes(content)
    assert message in errors_of(registry, "a", file)


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        (
            {"models": ["vea"], "datasets": ["minst"]},
            ["Did you mean 'vae'", "Did you mean 'mnist'"],
        ),
        ({"metrics": ["kdf"]}, ["unknown metric 'kdf'. Did you mean 'kde'?"]),
        ({"settings": ["latent_dims=3"]}, ["unknown parameter 'latent_dims'", "'latent_dim'"]),
        ({"settings": ["vea.latent_dim=3"]}, ["unknown plugin 'vea'. Did you mean 'vae'?"]),
        (
            {"settings": ["iml-gmm.epochs=3"]},
            ["'iml-gmm' must be one of the plugins to run; got none of vae, digits,"],
        ),
        ({"settings": ["latent_dim=x"]}, ["--set latent_dim=x: vae.latent_dim must be", "'x'"]),
        ({"settings": ["latent_dim=0"]}, ["must be greater than or equal to 1; got 0"]),
        ({"settings": ["latent_dim"]}, ["must be parameter=value"]),
        ({"settings": ["latent_dim=3,"]}, ["must be parameter=value"]),
        ({"seeds": "a"}, ["--seeds: must be like 0..2 or 0,1,2; got 'a'"]),
        ({"seeds": "-3"}, ["--seeds: must be greater than or equal to 0"]),
        ({"seeds": "2..1"}, ["--seeds: must be like 0..2, the smaller number first"]),
        ({"seeds": "0..99999999"}, ["--seeds: must be at most 10000 seeds"]),
        ({"settings": ["n_draws=3"]}, ["'n_draws' is one of the benchmark. Use --n-draws"]),
        ({"n_samples": 1}, ["--n-samples: must be greater than or equal to 2; got 1"]),
    ],
)
def test_mistakes_on_the_command_line(registry, given, messages):
    told = errors_of(registry, None, None, **{"models": ["vae"], "datasets": ["digits"], **given})
    for message in messages:
        assert message in told


def test_a_model_that_does_not_fit_the_data_is_refused_before_anything_runs(registry):
    given = {"models": ["iml-gmm"], "datasets": ["digits"], "settings": ["latent_dim=65"]}
    told = errors_of(registry, None, None, **given)
    assert "--set latent_dim=65: iml-gmm.latent_dim must be at most 64" in told


def test_an_unknown_benchmark_is_answered_with_the_list(registry, path):
    assert "unknown benchmark 'smal'. Did you mean 'small'?" in errors_of(registry, "smal", path)


def test_nothing_to_run_names_what_is_missing(registry):
    told = errors_of(registry, None, None, models=["vae"])
    assert "--datasets must be given" in told


class _Unresolvable(Model[Params]):
    """Fails when it is planned."""

    name = "unresolvable"

    @classmethod
    def resolve(cls, params, space):
        raise RuntimeError("no idea")

    def fit(self, train, valid, context):
        """Learn nothing."""

    def sample(self, n, generator):
        """Return zeros."""
        return torch.zeros(n, *self.space.event_shape)


class _Forgetful(_Unresolvable):
    """Returns nothing."""

    name = "forgetful"

    @classmethod
    def resolve(cls, params, space):
        """Forget to return."""


class _Fine(_Unresolvable):
    """Does not fail."""

    name = "fine"

    @classmethod
    def resolve(cls, params, space):
        return params


class _Spaceless(Dataset[Params]):
    """Does not know what an example is."""

    name = "spaceless"

    @property
    def space(self):
        raise RuntimeError("no space")

    def load(self, sources):
        """Never called."""


class _Plane(_Spaceless):
    """Knows it."""

    name = "plane"
    space = Space("vector", (2,))


class _Zero(Metric[Params]):
    """Zero."""

    name = "zero"
    higher_is_better = True

    def compute(self, evaluation):
        """Compute nothing."""
        return Score(0.0)


def test_a_plugin_that_fails_while_planning_stops_nobody(entry_point):
    module = ModuleType("failing")
    module.imlbench_models = hookimpl(
        lambda: [_Unresolvable, _Forgetful, _Fine], specname="imlbench_models"
    )
    module.imlbench_datasets = hookimpl(lambda: [_Spaceless, _Plane], specname="imlbench_datasets")
    module.imlbench_metrics = hookimpl(lambda: [_Zero], specname="imlbench_metrics")
    registry = Registry([entry_point("failing", module)])
    plan = make_plan(
        make_benchmark(None, None, models=["*"], datasets=["*"], metrics=["*"]), registry
    )
    assert [(job.model, job.dataset) for job in plan.jobs] == [("fine", "plane")]
    assert {(skip.model, skip.dataset, skip.is_failure) for skip in plan.skips} == {
        ("unresolvable", "plane", True),
        ("unresolvable", "spaceless", True),
        ("forgetful", "plane", True),
        ("forgetful", "spaceless", True),
        ("fine", "spaceless", True),
    }
    assert any("RuntimeError: no idea" in skip.reason for skip in plan.skips)


def test_a_comma_in_quotation_marks_separates_nothing(registry):
    given = {"models": ["vae"], "datasets": ["violin"], "settings": ['violin.path="a,b.wav",c.wav']}
    jobs = plan_of(registry, None, None, **given).jobs
    assert [job.dataset_params["path"] for job in jobs] == ["a,b.wav", "c.wav"]


def test_named_benchmarks_are_found_outside_the_clone(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_file(None)
    assert found is not None
    assert make_benchmark("demo", found).datasets == ("digits",)


@pytest.mark.parametrize("name", ["vae", "mnist", "kde_tuned", "spoken-digits", "iml-hmm"])
def test_what_plugins_prints_is_for_people(registry, name):
    text = describe_one(registry, name)
    assert "Undefined" not in text
    assert "Annotated" not in text
    assert "FieldInfo" not in text
