"""Plugins: found, selected, quarantined, and never in each other's way."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from imlbench import LogProb, Metric, Model, Params, Score, UserError, hookimpl
from imlbench.plan.registry import Registry


def make_model(model_name: str, model_family: str = "") -> type[Model]:
    class Constant(Model[Params]):
        """Always zero."""

        name = model_name
        family = model_family

        def fit(self, train, valid, context):
            """Learn nothing."""

        def sample(self, n, generator):
            """Return zeros."""
            return torch.zeros(n, *self.space.event_shape)

    return Constant


def make_metric(needed: object, direction: bool | None = True) -> type[Metric]:
    class Constant(Metric[Params]):
        """Always zero."""

        name = "constant"
        requires = (needed,)

        def compute(self, evaluation):
            """Return zero."""
            return Score(0.0)

    if direction is not None:
        Constant.higher_is_better = direction
    return Constant


def module_with(**hooks) -> ModuleType:
    module = ModuleType("some_plugin")
    for name, function in hooks.items():
        setattr(module, name, hookimpl(function))
    return module


def test_built_in_plugins_come_by_entry_point(registry):
    assert {"iml-gmm", "vae"} <= set(registry.models)
    assert {"digits", "mnist"} <= set(registry.datasets)
    assert {"kde", "kde_paper"} <= set(registry.metrics)
    assert not registry.broken
    assert registry.shipped_by(registry.models["vae"]).startswith("imlbench ")


def test_selection_by_name_family_and_glob(entry_point):
    models = [make_model("a-one", "a"), make_model("a-two", "a"), make_model("b")]
    registry = Registry([entry_point("p", module_with(imlbench_models=lambda: models))])
    names = lambda *patterns: [cls.name for cls in registry.select_models(patterns)]  # noqa: E731
    assert names("b") == ["b"]
    assert names("a") == ["a-one", "a-two"]
    assert names("*-two", "a") == ["a-two", "a-one"]
    assert names("*") == ["a-one", "a-two", "b"]


def test_unknown_names_get_a_suggestion_and_the_list(registry):
    with pytest.raises(UserError) as caught:
        registry.select_models(["vea", "iml", "nothing"])
    first, second = caught.value.messages
    assert "unknown model 'vea'. Did you mean 'vae'? Known:" in first
    assert "'nothing'" in second
    assert "iml-gmm" in first


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (ImportError("no module named flux"), "ImportError: no module named flux"),
        (module_with(imlbench_models=lambda: 1 / 0), "ZeroDivisionError"),
        (module_with(imlbench_models=lambda: [dict]), "not a subclass of imlbench.Model"),
        (module_with(imlbench_models=lambda: [Model]), "lacks the methods fit, sample"),
        (module_with(imlbench_model=lambda: []), "imlbench_model"),
        (module_with(imlbench_models=lambda: [make_model("a b")]), "must be named by letters"),
        (module_with(imlbench_metrics=lambda: [make_metric("log_porb")]), "got 'log_porb'"),
        (module_with(imlbench_metrics=lambda: [make_metric(Tensor)]), "must be a protocol"),
        (module_with(imlbench_metrics=lambda: [make_metric(LogProb, None)]), "higher_is_better"),
        (module_with(imlbench_artifacts=lambda: [Model]), "not a subclass of imlbench.Artifact"),
    ],
)
def test_a_broken_plugin_is_named_and_stops_nobody(entry_point, module, message):
    good = module_with(imlbench_models=lambda: [make_model("good")])
    registry = Registry([entry_point("bad", module), entry_point("good", good)])
    assert list(registry.models) == ["good"]
    assert [plugin.name for plugin in registry.broken] == ["bad"]
    assert message in registry.broken[0].error


def test_a_plugin_that_breaks_late_is_left_out_as_a_whole(entry_point):
    half = module_with(imlbench_models=lambda: [make_model("half")], imlbench_metrics=lambda: 1 / 0)
    registry = Registry([entry_point("half", half)])
    assert not registry.models
    assert registry.broken


def test_two_plugins_with_one_name_are_an_error_that_names_both(entry_point):
    one, two = make_model("same"), make_model("same")
    two.__qualname__ = "Other"
    plugins = [
        entry_point("one", module_with(imlbench_models=lambda: [one])),
        entry_point("two", module_with(imlbench_models=lambda: [two])),
    ]
    with pytest.raises(UserError, match=r"'same' must be unique; .*Constant and .*Other"):
        Registry(plugins)
