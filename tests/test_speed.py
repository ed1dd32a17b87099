"""Measurements of speed: arithmetic, tables and exit status, with made-up clocks and cases."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import scipy.stats
import torch
from click.testing import CliRunner

from imlbench.densities import GaussianHMM, GaussianMixture
from imlbench.errors import DataError
from imlbench.plan.config import make_benchmark
from imlbench.plan.planning import make_plan
from imlbench.plan.registry import Registry
from imlbench.records.folder import Store
from speed import __main__ as command
from speed import hmm, jobs, kde, mixture, precision, report, reuse
from speed.case import Agreement, Case, Claim, Failed, Measured, Note, Seconds, Spread
from speed.command import environment, imlbench, options, processor_seconds
from speed.measure import interleaved, per_iteration, ratio, seconds, spread
from speed.runner import measure

FAST = Claim("fast", 3.0, "arithmetic", at_least=2.0)
SMALL = Claim("small", 100.0, "arithmetic", at_most=512.0, unit="MiB")
FREE = Claim("a name of thirty characters ok", 1e-9, "arithmetic", unit="nats")


class Clock:
    """Shows the time that fake work has taken."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def work(self, duration):
        self.now += duration


def make_case(name="made-up", difference=0.0, fast=2.5):
    def run():
        yield Measured("fast", Spread(fast, fast / 2, 1234.5))
        yield Measured("small", Spread.single(600.0))
        yield Failed("a name of thirty characters ok", "MemoryError: " + "long " * 40)
        yield Seconds("work", Spread(0.5, 0.25, 1.0))
        yield Agreement("two sums", difference, 1e-4)
        yield Note("A remark.")

    return Case(name, "Ratios", "Fair.", (FAST, SMALL, FREE), run)


@pytest.fixture
def run_speed(monkeypatch, tmp_path):
    """The command line with made-up cases, run in this process; returns click's result."""

    def invoke(*arguments, cases=None):
        made_up = {case.name: case for case in cases or [make_case()]}
        monkeypatch.setattr(command, "CASES", made_up)
        monkeypatch.setattr(command, "FOLDER", tmp_path)
        monkeypatch.setattr(command, "measure_apart", measure)
        return CliRunner().invoke(command.main, ["--threads", "1", *arguments])

    return invoke


def test_seconds_are_those_of_the_call():
    clock = Clock()
    assert seconds(lambda: clock.work(2.5), clock) == 2.5


def test_an_iteration_is_timed_without_what_a_fit_does_once():
    clock = Clock()

    def prepare(n_iter):
        clock.work(50.0)  # not timed at all
        return lambda: clock.work(7.0 + 0.5 * n_iter)  # 7 s once

    assert per_iteration(prepare, first=1, more=4, clock=clock)() == pytest.approx(0.5)


def test_timers_take_turns_and_the_warm_up_does_not_count():
    order = []

    def timer(name):
        order.append(name)
        return float(len(order))

    times = interleaved({"a": lambda: timer("a"), "b": lambda: timer("b")}, 2)
    assert order == ["a", "b"] * 3
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_ratio_is_of_neighbours_in_time():
    assert ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([4.0, 1.0]) == Spread(2.5, 1.0, 4.0)


def test_a_time_lost_in_noise_gives_no_ratio():
    with pytest.raises(ValueError, match="Measure more iterations"):
        ratio([1.0], [-0.1])


def test_memory_that_is_taken_shows_in_the_peak():
    """In a process of its own: elsewhere, 32 MiB may be free that already count."""
    code = (
        "import torch; from speed.measure import memory; before = memory('VmRSS'); "
        "taken = torch.ones(2**23); del taken; print(memory('VmHWM') - before)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(answer.stdout) >= 30 * 2**20


def test_the_brute_force_sum_is_scipys_density():
    x, samples = torch.tensor([[0.1, 0.3], [0.5, 0.2]]), torch.tensor([[0.0, 0.3], [0.4, 0.4]])
    terms = scipy.stats.norm(samples.double()[None], kde.BANDWIDTH).pdf(x.double()[:, None])
    expected = torch.from_numpy(terms).prod(2).mean(1).log()
    torch.testing.assert_close(kde.brute_force(x, samples), expected, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_mixtures_start_alike():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(400, 3, generator=generator)
    start = GaussianMixture(3, 2, max_iter=1).fit(h, generator=generator)
    ours, theirs = mixture.imlbench_fit(start, h), mixture.sklearn_fit(start, h.double())
    for n_iter in (1, 3):
        expected = theirs(n_iter)().means_
        torch.testing.assert_close(
            ours(n_iter)().means, torch.from_numpy(expected), rtol=1e-4, atol=1e-4
        )


def test_the_hidden_markov_models_start_alike():
    generator = torch.Generator().manual_seed(0)
    h, lengths = torch.randn(60, 3, generator=generator), [10] * 6
    start = GaussianHMM(3, 2, max_iter=1, transition_prior=0.1)
    start.fit(h, generator=generator, lengths=lengths)
    ours = hmm.imlbench_fit(start, h, lengths)(2)().log_likelihoods
    for implementation in ("scaling", "log"):
        theirs = hmm.hmmlearn_fit(start, h, lengths, implementation)(2)().monitor_.history
        assert ours[:2] == pytest.approx([value / 60 for value in theirs], abs=1e-9)
    assert all(later > earlier for earlier, later in pairwise(ours))


@pytest.mark.parametrize(
    ("value", "expected"), [(1.99, "missed"), (2.0, "met"), (9.0, "met"), (math.nan, "missed")]
)
def test_a_target_is_met_at_its_value(value, expected):
    row = {"at_least": 2.0, "at_most": None, "spread": {"value": value}}
    assert report.verdict(row) == expected
    row = {"at_least": None, "at_most": -2.0, "spread": {"value": -value}}
    assert report.verdict(row) == expected


def test_the_table_shows_prediction_target_measurement_and_verdict_in_80_columns(run_speed):
    result = run_speed()
    assert result.exit_code == 0  # a missed target is no error
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line[:32].strip(): line[32:].split() for line in lines}
    assert rows["fast"] == ["3", "≥", "2", "2.5x", "(1.25..1230)", "met"]
    assert rows["small"] == ["100", "≤", "512", "600", "MiB", "missed"]
    assert rows[FREE.name] == ["1e-09", "no", "result"]
    assert "MemoryError" in result.stdout


def test_all_claims_fit_the_table():
    claims = [claim for case in command.CASES.values() for claim in case.claims]
    assert all(len(claim.name) <= 30 for claim in claims)
    for case in command.CASES.values():
        assert len({claim.name for claim in case.claims}) == len(case.claims)


@pytest.mark.parametrize("difference", [1.1e-4, math.nan])
def test_results_that_disagree_are_an_error(run_speed, tmp_path, difference):
    result = run_speed(cases=(make_case(difference=difference), make_case("other")))
    assert result.exit_code == 1
    assert "DISAGREES: two sums" in result.stdout
    assert "other: Ratios" in result.stdout  # the next case is measured all the same
    assert "DISAGREES: two sums" in (tmp_path / "RESULTS.md").read_text()


def test_an_unknown_case_is_one_message(run_speed, tmp_path):
    result = run_speed("mixtrue", cases=(make_case("mixture"),))
    assert result.exit_code == 2
    assert result.stderr == (
        "error: unknown case 'mixtrue'. Did you mean 'mixture'? Known: mixture.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_one_line(run_speed):
    case = make_case()
    needy = Case(case.name, case.title, case.about, case.claims, case.run, ("no_such_package",))
    result = run_speed(cases=(needy,))
    assert result.exit_code == 2
    assert result.stderr == (
        "error: no_such_package not installed: pip install 'imlbench[speed]'\n"
    )


def test_a_case_that_fails_costs_no_other(run_speed, tmp_path):
    def run():
        raise DataError("dataset mnist: MNIST/raw not found")

    broken = Case("broken", "Ratios", "Fair.", (FAST,), run)
    result = run_speed(cases=(broken, make_case()))
    assert result.exit_code == 1
    assert "error: broken: dataset mnist: MNIST/raw not found" in result.stderr
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["made-up"]


def test_a_selection_keeps_the_results_of_other_cases(run_speed, tmp_path):
    cases = make_case("first"), make_case("second")
    run_speed(cases=cases)
    before = json.loads((tmp_path / "results.json").read_text())
    run_speed("second", cases=(cases[0], make_case("second", fast=77.0)))
    after = json.loads((tmp_path / "results.json").read_text())
    assert after["first"] == before["first"]
    assert after["second"]["rows"][0]["spread"]["value"] == 77.0
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.index("## first") < page.index("2.5x") < page.index("## second")
    assert page.index("## second") < page.index("77x")


def test_globs_name_several_cases(run_speed, tmp_path):
    run_speed("fi*", cases=(make_case("first"), make_case("second"), make_case("fifth")))
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["first", "fifth"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has /proc")
def test_processor_time_is_that_of_the_process_itself():
    start = time.process_time()
    while time.process_time() < start + 0.2:
        pass
    stat = Path("/proc/self/stat").read_text()
    assert processor_seconds(stat) == pytest.approx(time.process_time(), abs=0.05)
    tick = 1 / os.sysconf("SC_CLK_TCK")
    fields = " ".join(map(str, range(3, 30)))  # by their numbers in proc(5)
    assert processor_seconds(f"7 (a) (b 1) {fields}") == pytest.approx((14 + 15) * tick)


def test_commands_see_neither_servers_nor_numbers_of_threads():
    given = {"PATH": "/bin", "MLFLOW_TRACKING_URI": "http://x", "OMP_NUM_THREADS": "1"}
    assert environment(given) == {"PATH": "/bin"}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has /proc")
def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"^imlbench plan nobody: exit status 2: .*nobody"):
        imlbench(tmp_path, "plan", "nobody")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has /proc")
def test_jobs_that_were_copied_are_done_and_their_times_add_up(tmp_path):
    """The copies are reused; of the two jobs that were run, every moment is in one phase."""
    store = Store(tmp_path / "results")
    toy = {"models": "reference-train", "datasets": "toy-2d", "metrics": "modes_covered"}
    given = options(**toy, n_samples=10, set="toy-2d.n_train=100", results=store.root)
    imlbench(tmp_path, "run", *given, *options(seeds=0))
    chosen = {name: [value] for name, value in toy.items()}
    benchmark = make_benchmark(
        None, None, **chosen, n_samples=10, settings=["toy-2d.n_train=100"], seeds="0..21"
    )
    reuse.copy_to_seeds(store, make_plan(benchmark, Registry()))
    again = imlbench(tmp_path, "run", *given, *options(seeds="0..21"))
    assert "[22/22] 22 jobs: done (reused)" in again.said
    imlbench(tmp_path, "run", *given, *options(seeds="22"))
    found = {record.seed: record for record in store.records()}
    pair = [found[0], found[22]]
    (seconds,) = jobs.seconds_per_job(pair)
    assert seconds == found[22].ended - found[0].ended > 0
    parts = jobs.phases(pair)
    assert sum(part for (part,) in parts.values()) == pytest.approx(seconds, abs=1e-3)
    assert all(part > -0.02 for (part,) in parts.values())  # files' times are of the kernel's clock


def test_every_measured_number_of_the_page_is_from_the_records(run_speed, tmp_path):
    run_speed()
    page = (tmp_path / "RESULTS.md").read_text()
    for expected in ("| fast", "arithmetic", "work: 0.5 s (0.25..1)", "- A remark.", "threads"):
        assert expected in page


def test_what_bfloat16_changes_is_paired_over_seeds():
    """The interval and the p value are scipy's; a seed that lacks a precision does not count."""
    exact, rounded = [1.0, 2.0, 4.0, 7.0], [1.5, 2.25, 4.75, 7.125]
    rows = [
        {"dataset": "d", "model": "m", "seed": seed, "precision": name, "status": "done"}
        | {"kde": value, "kde.stderr": 0.1, "fit_seconds": 2.0 + seed}
        for name, values in (("float32", exact), ("bfloat16", rounded))
        for seed, value in enumerate(values)
    ]
    alone = {**rows[0], "seed": 9}
    failed = {**rows[-1], "seed": 9, "status": "failed"}
    kde, seconds = precision.differences(pd.DataFrame([*rows, alone, failed]))
    assert (kde.metric, seconds.metric) == ("kde", "fit_seconds")
    truth = scipy.stats.ttest_rel(rounded, exact)
    low, high = truth.confidence_interval(0.95)
    mean, half = kde.interval()
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert kde.p_value() == pytest.approx(truth.pvalue)
    page = precision.markdown([kde, seconds], "command")
    assert "| m | kde | 4 | 3.5 | +0.41 ± 0.4 |  |" in page
    assert "1.00 times as fast" in page
