"""Twelve kinds of change, and what is computed again after each: exactly what depends on it."""

from __future__ import annotations

import ast
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from imlbench import Sources
from imlbench.plan import identity
from imlbench.plan.config import make_benchmark
from imlbench.plan.identity import closure, code_of
from imlbench.plan.planning import have_changed, make_plan
from tests.plans import identify_data

ROOT = Path(__file__).parent.parent
MODELS = ("iml-gmm", "vae", "gan", "wgan", "reference-gmm")
METRICS = ("kde", "reconstruction_error", "log_likelihood_manifold")
IML_STAGE = ("imlbench_iml.autoencoders", "imlbench.runner.fitting")


@dataclass(frozen=True)
class Tree:
    """A copy of the sources, and what identifies the results of jobs on digits that they make."""

    root: Path
    registry: object

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace the first ``old``, which must be there."""
        file = self.root / path
        text = file.read_text(encoding="utf-8")
        assert old in text, f"{path} has no {old!r} any more"
        file.write_text(text.replace(old, new, 1), encoding="utf-8")

    def add(self, path: str, text: str) -> None:
        """Append a line, in a new file if need be."""
        with (self.root / path).open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")

    def keys(self, *settings: str, **given: int) -> dict[str, str]:
        """Return the keys of all fits, samples and scores, and of the shared auto-encoder."""
        identity.forget()
        benchmark = make_benchmark(
            None,
            None,
            models=MODELS,
            datasets=["digits"],
            metrics=METRICS,
            settings=["latent_dim=5", *settings],
            **given,
        )
        plan = identify_data(make_plan(benchmark, self.registry), self.registry, Sources())
        found = {"stage": code_of(*IML_STAGE)}
        for job in plan.jobs:
            found |= {f"{job.model} fit": job.fit_key, f"{job.model} draw": job.draw_key}
            found |= {f"{job.model} {task.label}": task.key(job) for task in plan.metrics}
        return found


@pytest.fixture
def tree(registry, tmp_path, monkeypatch):
    for folder in ("imlbench", "plugins"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    places = {path.name: path for path in (tmp_path / "plugins").iterdir()}
    places["imlbench"] = tmp_path / "imlbench"
    monkeypatch.setattr(identity, "_place", functools.cache(places.get))
    yield Tree(tmp_path, registry)
    identity.forget()  # what was said of the copy


def of(*models: str) -> set[str]:
    """Everything that is computed for these models."""
    return {f"{model} {what}" for model in models for what in ("fit", "draw", *METRICS)}


def what(*names: str) -> set[str]:
    """One thing of every model."""
    return {f"{model} {name}" for model in MODELS for name in names}


CHANGES: dict[str, tuple[Callable[[Tree], object], set[str]]] = {
    "a comment": (
        lambda tree: tree.add("imlbench/densities/mixture.py", "# Nothing but a comment."),
        set(),
    ),
    "a docstring": (
        lambda tree: tree.edit("imlbench/densities/mixture.py", '"""', '"""Indeed: '),
        set(),
    ),
    "a density's numerics": (
        lambda tree: tree.edit("imlbench/densities/mixture.py", "_EMPTY = 1e-8", "_EMPTY = 1e-7"),
        of("iml-gmm", "reference-gmm"),
    ),
    "a metric's code": (
        lambda tree: tree.add("plugins/imlbench_metrics/kde.py", "SOMETHING = 1"),
        what("kde"),
    ),
    "a metric added": (
        lambda tree: (
            tree.add("plugins/imlbench_metrics/fresh.py", "class Fresh: ..."),
            tree.add("plugins/imlbench_metrics/__init__.py", "from imlbench_metrics import fresh"),
        ),
        set(),
    ),
    "the runner": (
        lambda tree: [
            tree.add(f"imlbench/{path}.py", "SOMETHING = 1")
            for path in (
                "runner/job",
                "runner/local",
                "runner/context",
                "records/folder",
                "session",
            )
        ],
        set(),
    ),
    "derive_seed": (
        lambda tree: tree.edit("imlbench/api/randomness.py", "digest[:8]", "digest[8:16]"),
        of(*MODELS) | {"stage"},
    ),
    "a plugin's helper module": (
        lambda tree: tree.edit(
            "plugins/imlbench_iml/invertible.py", "SLOPE = 0.01", "SLOPE = 0.02"
        ),
        of("iml-gmm") | {"stage"},
    ),
    "another plugin": (
        lambda tree: tree.add("plugins/imlbench_gan/gan.py", "SOMETHING = 1"),
        of("gan", "wgan"),
    ),
    "how samples are drawn": (
        lambda tree: tree.add("imlbench/runner/drawing.py", "SOMETHING = 1"),
        what("draw", "kde"),
    ),
    "the dataset's code, with the same content": (
        lambda tree: tree.add("plugins/imlbench_images/digits.py", "SOMETHING = 1"),
        what(*METRICS),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_code_redoes_what_depends_on_it(tree, change):
    edit, expected = CHANGES[change]
    before = tree.keys()
    edit(tree)
    after = tree.keys()
    assert {name for name in before if after[name] != before[name]} == expected


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ([], {"n_draws": 3}, what("draw", "kde")),
        (["filter_length=30", "width=7"], {}, set()),  # for sequences, for larger images
        (["kde.h=0.1"], {}, what("kde")),
        (["iml-gmm.n_components=4"], {}, of("iml-gmm")),
    ],
)
def test_a_change_of_parameters_redoes_what_depends_on_it(tree, settings, given, expected):
    before, after = tree.keys(), tree.keys(*settings, **given)
    after = {name.replace("kde[h=0.1]", "kde"): key for name, key in after.items()}
    assert {name for name in before if after[name] != before[name]} == expected


def test_a_new_version_of_torch_is_told_in_the_record_and_redoes_nothing(tree, monkeypatch):
    before = tree.keys()
    monkeypatch.setattr("torch.__version__", "99.0")
    assert tree.keys() == before


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("x = 1  # one", True),
        ('"""What it is."""\nx = 1', True),
        ("x = (\n    1\n)", True),
        ('x = 1\n"""What x is."""', True),
        ("x = 2", False),
        ("x = 1.0", False),
        ("y = 1", False),
        ("x = 1\nprint(x)", False),
        ("this is no Python", False),
    ],
)
def test_syntax_counts_and_its_form_does_not(tmp_path, text, same):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("x = 1\n")
    other.write_text(text)
    assert (identity._look(one).syntax == identity._look(other).syntax) is same


SOURCES = {
    "package/__init__.py": "from package.inner import public\nfrom package.rest import other",
    "package/inner.py": "from . import helper\ndef public(): pass",
    "package/helper.py": "import package.far.away as away\naway.thing",
    "package/far/__init__.py": "",
    "package/far/away.py": "if TYPE_CHECKING:\n    import package.rest",
    "package/rest.py": "other = 1",
    "plugin.py": "import numpy\nfrom package import public\ndef f():\n    import later",
    "later.py": "",
    "unused.py": "",
}


def test_the_closure_follows_names_to_where_they_are_defined(tmp_path, monkeypatch):
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = {str(path.relative_to(tmp_path)) for path in closure("plugin")}
    assert found == {
        "plugin.py",
        "later.py",  # imported inside a function
        "package/inner.py",  # where public is defined, not what else the package exports
        "package/helper.py",
        "package/far/away.py",
    }


def test_what_is_noted_of_files_spares_parsing_and_says_the_same(tmp_path, monkeypatch):
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    notes = tmp_path / "cache" / "code.json"

    def found() -> tuple[str, int]:
        """The code as a new process sees it, and how many files it had to parse."""
        identity.forget()
        parsed = []
        monkeypatch.setattr(identity, "_parse", lambda file: parsed.append(file) or PARSE(file))
        return code_of("plugin"), len(parsed)

    code, n_parsed = found()
    assert n_parsed > 5  # packages that only pass on are looked into, too
    identity.note()
    assert found() == (code, 0)
    (tmp_path / "package/far/away.py").write_text("import package.rest")
    other, n_parsed = found()
    assert other != code
    assert n_parsed == 2  # what was changed, and what it has come to import
    (tmp_path / "package/far/away.py").write_text(SOURCES["package/far/away.py"])
    notes.write_bytes(notes.read_bytes().replace(b"away", b"gone"))  # damaged
    assert found()[0] == code
    assert found()[1] > 5


PARSE = identity._parse


def test_where_something_is_missing_counts():
    """None in a list of the syntax tree is a place, such as a parameter without a default."""

    def spelt(text: str) -> list[str]:
        return list(identity._tokens(ast.parse(text)))

    assert spelt("def f(*, a, b=1): ...") != spelt("def f(*, a=1, b): ...")
    assert spelt("{**a, 'b': c}") != spelt("{'b': a, **c}")


def test_packages_without_init_and_names_that_lead_in_circles(tmp_path, monkeypatch):
    sources = {
        "spaces/inside/model.py": "import spaces.inside.helper",
        "spaces/inside/helper.py": "",
        "circle/__init__.py": "from . import layers",
        "circle/layers/one.py": "",
        "circle/model.py": "from circle import layers\nif not TYPE_CHECKING: import circle.late",
        "circle/late.py": "",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    identity.forget()

    def names(module: str) -> set[str]:
        return {str(path.relative_to(tmp_path)) for path in closure(module)}

    assert names("spaces.inside.model") == {"spaces/inside/model.py", "spaces/inside/helper.py"}
    assert {"circle/model.py", "circle/late.py"} <= names("circle.model")


def test_an_edit_counts_in_the_same_process_once_there_is_a_new_plan(tree):
    before = tree.keys()
    tree.add("plugins/imlbench_vae/vae.py", "SOMETHING = 1")
    benchmark = make_benchmark(None, None, models=["vae"], datasets=["digits"], metrics=["kde"])
    make_plan(benchmark, tree.registry)
    assert tree.keys()["vae fit"] != before["vae fit"]
    (job,) = identify_data(make_plan(benchmark, tree.registry), tree.registry, Sources()).jobs
    assert not have_changed(job, (), (), tree.registry)
    tree.add("plugins/imlbench_vae/vae.py", "SOMETHING = 2")
    identity.forget()  # as in the process of a job
    assert have_changed(job, (), (), tree.registry)
