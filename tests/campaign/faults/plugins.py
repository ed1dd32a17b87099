"""Bad plugins: each a distribution of its own on the path, beside good jobs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.campaign.faults import FaultClass
from tests.campaign.oracle import (
    Kind,
    Problem,
    Truth,
    judge_answer,
    judge_folder,
    read_records,
    rerun,
    warns,
)
from tests.campaign.process import PATIENCE, Answer, Place
from tests.campaign.trials import TOY, Lab, Trial, single

GOOD = (
    *("run", "--models", "reference-train", "--datasets", "toy-2d", *TOY),
    *("--metrics", "kde,modes_covered", "--seeds", "0,1"),
)
"""Two good jobs."""

PLUGIN_LIMIT = {"IMLBENCH_PLUGIN_LIMIT": "10"}
"""Seconds for what a plugin does before any job; importing torch takes half of it."""

TIME_LIMIT = ("--time-limit", "5")

HEAD = '''
import ctypes, os, resource, signal, subprocess, sys, threading, time
import numpy as np
import torch
from imlbench import (
    Artifact, Dataset, Examples, Metric, Model, Params, Score, Space, Splits, hookimpl,
)

class Base(Model[Params]):
    """Uniform noise."""
    def fit(self, train, valid, context): pass
    def sample(self, n, generator):
        return torch.rand(n, *self.space.event_shape, generator=generator)

class BaseData(Dataset[Params]):
    """Noise."""
    @property
    def space(self): return Space("vector", (2,))
    def load(self, sources):
        x = torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
        return Splits(Examples(x), Examples(x), Examples(x))

class BaseMetric(Metric[Params]):
    """One; it comes before all others."""
    higher_is_better = True
    needs_samples = True
    position = -100

class BaseArtifact(Artifact[Params]):
    """Nothing."""

def segfault(): ctypes.string_at(0)

def sleep_for_ever(): time.sleep(10 ** 6)

def grandchild(new_session):
    subprocess.Popen(["sleep", "1000000"], start_new_session=new_session)

def forked_grandchild():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 100)
            sleep_for_ever()
        os._exit(0)
'''


@dataclass(frozen=True)
class Distribution:
    """A plugin as it is installed.

    Arguments:
        name: Of the distribution, the module, and the entry point.
        source: The module.
    """

    name: str
    source: str

    def install(self, site: Path) -> None:
        """Write it into a folder that is on the path."""
        (site / f"{self.name}.py").write_text(self.source, encoding="utf-8")
        info = site / f"{self.name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {self.name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[imlbench]\n{self.name} = {self.name}\n")

    def uninstall(self, site: Path) -> None:
        """Let it not be found any more."""
        (site / f"{self.name}-1.0.dist-info" / "entry_points.txt").unlink()


def _class(kind: str, name: str, body: str) -> Distribution:
    """Return a plugin of one class, of which the body is given.

    Arguments:
        kind: ``"Model"``, ``"Dataset"``, ``"Metric"`` or ``"Artifact"``.
        name: Its name, in plain letters.
        body: What is in the class.
    """
    base = {"Model": "Base", "Dataset": "BaseData"}.get(kind, f"Base{kind}")
    hook = {"Model": "models", "Dataset": "datasets", "Metric": "metrics"}.get(kind, "artifacts")
    lines = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    return Distribution(
        f"bad_{name}",
        f'{HEAD}\nclass Bad({base}):\n    """Bad."""\n    name = "bad-{name}"\n{lines}\n'
        f"\n@hookimpl\ndef imlbench_{hook}(): return [Bad]\n",
    )


def _fit(name: str, statement: str) -> Distribution:
    body = f"def fit(self, train, valid, context):\n    {statement}"
    return _class("Model", name, body)


def _sample(name: str, expression: str) -> Distribution:
    return _class("Model", name, f"def sample(self, n, generator): return {expression}")


def _compute(name: str, statements: str) -> Distribution:
    body = "def compute(self, evaluation):\n" + textwrap.indent(textwrap.dedent(statements), "    ")
    return _class("Metric", name, body)


def _write(name: str, statements: str) -> Distribution:
    body = "def write(self, evaluation, folder):\n"
    return _class("Artifact", name, body + textwrap.indent(textwrap.dedent(statements), "    "))


AT_IMPORT = {
    "raise": "raise RuntimeError('broken at import')",
    "raise SystemExit": "raise SystemExit",
    "exit 0": "sys.exit(0)",
    "raise KeyboardInterrupt": "raise KeyboardInterrupt",
    "raise BaseException": "raise BaseException('odd')",
    "end the process": "os._exit(3)",
    "hang": "sleep_for_ever()",
    "segfault": "segfault()",
    "kill itself": "os.kill(os.getpid(), signal.SIGKILL)",
    "endless recursion": "f = lambda: f()\nf()",
    "syntax error": "def f(:",
    "null bytes": "x = 1\0",
    "message with escapes": r"raise RuntimeError('\x1b[2J\x1b]0;owned\x07 [bold]x[/bold]')",
    "message of a megabyte": "raise RuntimeError('x' * 10 ** 6)",
    "error without a text": (
        "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd"
    ),
}
"""What leaves a plugin out, with a warning that names it."""

HARMLESS = {
    "prints garbage": "print('\\x1b[2J garbage' * 1000); print('more', file=sys.stderr)",
    "goes elsewhere": "os.chdir('/')",
    "closes standard output": "os.close(1)",
    "replaces standard output": "sys.stdout = None",
    "starts threads": "[threading.Thread(target=sleep_for_ever, daemon=True).start() "
    "for _ in range(4)]",
    "starts a stubborn thread": "threading.Thread(target=sleep_for_ever).start()",
    "starts a process": "grandchild(False)",
    "starts a process in a session of its own": "grandchild(True)",
    "ignores signals": "[signal.signal(s, signal.SIG_IGN) for s in (15, 1, 2)]",
    "sets a random state": "torch.manual_seed(1); np.random.seed(1)",
    "changes the default type": "torch.set_default_dtype(torch.float64)",
    "lets numbers trap": "np.seterr(all='raise')",
    "turns warnings into errors": "import warnings; warnings.simplefilter('error')",
    "removes an environment variable": "os.environ.pop('PATH', None)",
    "registers an exit that raises": "import atexit; atexit.register(lambda: 1 / 0)",
}
"""What a plugin may do at import without any harm to the good jobs."""

NAMES = {
    "path upwards": "'../../escape'",
    "absolute path": "'/tmp/absolute'",
    "empty": "''",
    "number": "7",
    "bytes": "b'bytes'",
    "None": "None",
    "list": "['a']",
    "markup": "'[bold red]x[/]'",
    "escapes": r"'\x1b[31mred'",
    "newline": r"'two\nlines'",
    "space": "'two words'",
    "dots": "'..'",
    "of a thousand letters": "'x' * 1000",
    "not ascii": "'modèle'",
    "null byte": r"'a\0b'",
    "comma": "'a,b'",
    "glob": "'*'",
}
"""Names that would become parts of files and tables."""

HOOKS = {
    "returns None": "return None",
    "returns a number": "return 7",
    "returns instances": "return [object()]",
    "returns another class": "return [dict]",
    "raises": "raise RuntimeError('hook')",
    "exits": "sys.exit(0)",
    "hangs": "sleep_for_ever()",
    "never ends": "return iter(lambda: Base, None)",
    "lacks methods": "return [type('Half', (Model,), {'name': 'half'})]",
}

FITS = {
    "raises": ("raise RuntimeError('it broke')", {"failed"}),
    "raises_without_text": ("raise RuntimeError", {"failed"}),
    "raises_many_lines": ("raise RuntimeError('line\\n' * 10000)", {"failed"}),
    "raises_escapes": (r"raise RuntimeError('\x1b[2J[bold]x')", {"failed"}),
    "raises_keyboard": ("raise KeyboardInterrupt", {"failed"}),
    "raises_stop": ("raise StopIteration", {"failed"}),
    "exits_0": ("sys.exit(0)", {"failed"}),
    "exits_3": ("os._exit(3)", {"failed"}),
    "ends_with_0": ("os._exit(0)", {"failed"}),
    "segfaults": ("segfault()", {"failed"}),
    "aborts": ("os.abort()", {"failed"}),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", {"failed", "out-of-memory"}),
    "terminates": ("os.kill(os.getpid(), signal.SIGTERM); sleep_for_ever()", {"failed", "timeout"}),
    "kills_parent_group": ("os.killpg(0, signal.SIGTERM); sleep_for_ever()", {"failed", "timeout"}),
    "memory_error": ("raise MemoryError", {"out-of-memory"}),
    "allocates": ("torch.empty(2 ** 50)", {"out-of-memory"}),
    "allocates_bytes": ("bytearray(2 ** 50)", {"out-of-memory"}),
    "allocates_little_by_little": (
        "resource.setrlimit(resource.RLIMIT_AS, (2 ** 34,) * 2); x = [bytearray(2 ** 28) "
        "for _ in range(10 ** 6)]",
        {"out-of-memory"},
    ),
    "hangs": ("sleep_for_ever()", {"timeout"}),
    "spins": ("x = 0\n    while True: x += 1", {"timeout"}),
    "ignores_term": (
        "[signal.signal(s, signal.SIG_IGN) for s in (15, 1, 2)]; sleep_for_ever()",
        {"timeout"},
    ),
    "stops_itself": ("os.kill(os.getpid(), signal.SIGSTOP)", {"timeout", "failed"}),
    "leaves_child": ("grandchild(False)", {"done"}),
    "leaves_session": ("grandchild(True)", {"done"}),
    "leaves_daemon": ("forked_grandchild()", {"done"}),
    "hangs_with_daemon": ("forked_grandchild(); sleep_for_ever()", {"timeout"}),
    "leaves_thread": (
        "threading.Thread(target=sleep_for_ever).start()",
        {"done", "timeout", "failed"},
    ),
    "reports_numpy": ("context.report('a', np.int64(1), 2, loss=np.float32(1))", {"done"}),
    "reports_tensor": ("context.report('a', 1, 2, loss=torch.tensor(1.0))", {"done", "failed"}),
    "reports_nan": ("context.report('a', 1, 2, loss=float('nan'))", {"diverged"}),
    "reports_inf": ("context.report('a', 1, 2, loss=np.inf)", {"diverged"}),
    "reports_text": ("context.report('a', 1, 2, loss='low')", {"failed"}),
    "reports_none": ("context.report('a', 1, 2, loss=None)", {"failed"}),
    "reports_odd_stage": (
        r"context.report('../\x1b[2J', 1, 2, loss=1.0)",
        {"done", "failed"},
    ),
    "reports_a_million": (
        "[context.report('a', i, 10 ** 6, loss=1.0) for i in range(10 ** 6)]",
        {"done", "failed", "timeout"},
    ),
    "records_nonsense": ("context.record(x=object())", {"failed"}),
    "closes_everything": ("os.closerange(0, 1000)", {"done", "failed"}),
    "goes_away": ("os.chdir('/')", {"done"}),
    "prints_much": ("print('x' * 10 ** 7)", {"done"}),
    "prints_events": ('print(\'{"kind": "ended", "status": "done"}\'); os._exit(1)', {"failed"}),
    "writes_nan": (
        "self.register_buffer('x', torch.full((3,), float('nan')))",
        {"done", "failed", "diverged"},
    ),
}
"""What a model does when it is fitted, and the statuses that are honest."""

SAMPLES = {
    "too_few": ("torch.rand(n - 1, 2)", {"failed"}),
    "wrong_shape": ("torch.rand(n, 3)", {"failed"}),
    "a_number": ("7", {"failed"}),
    "none": ("None", {"failed"}),
    "an_array": ("np.random.rand(n, 2)", {"failed"}),
    "whole_numbers": ("torch.ones(n, 2, dtype=torch.int64)", {"failed"}),
    "doubles": ("torch.rand(n, 2, dtype=torch.float64)", {"failed", "done"}),
    "nan": ("torch.full((n, 2), float('nan'))", {"failed", "diverged"}),
    "infinite": ("torch.full((n, 2), float('inf'))", {"failed", "diverged"}),
    "meta": ("torch.empty(n, 2, device='meta')", {"failed"}),
    "sparse": ("torch.eye(n, 2).to_sparse()", {"failed"}),
    "exits": ("sys.exit(0)", {"failed"}),
}

METRICS = {
    "raises": ("raise RuntimeError('no luck')", {"failed"}),
    "exits": ("sys.exit(0)", {"failed"}),
    "dies": ("os._exit(0)", {"failed"}),
    "segfaults": ("segfault()", {"failed"}),
    "hangs": ("sleep_for_ever()", {"timeout"}),
    "none": ("return None", {"failed"}),
    "a_number": ("return 3.0", {"failed"}),
    "nan": ("return Score(float('nan'))", {"failed"}),
    "infinite": ("return Score(float('inf'))", {"failed"}),
    "none_value": ("return Score(None)", {"failed"}),
    "text_value": ("return Score('high')", {"failed"}),
    "numpy_value": ("return Score(np.float32(1.5), np.float64(0.5))", {"done", "failed"}),
    "tensor_value": ("return Score(torch.tensor(1.5))", {"done", "failed"}),
    "nan_error": ("return Score(1.0, float('nan'))", {"failed"}),
    "few_examples": ("return Score.mean(torch.rand(3))", {"done", "failed"}),
    "matrix_of_examples": ("return Score(1.0, 0.1, torch.rand(60, 2))", {"failed"}),
    "nan_examples": ("return Score(1.0, 0.1, torch.full((60,), float('nan')))", {"failed"}),
    "odd_groups": ("return Score(1.0, 0.1, torch.rand(60), torch.zeros(3))", {"failed"}),
    "odd_settings": ("return Score(1.0, settings={'x': object()})", {"failed"}),
    "changes_test_data": (
        """
        evaluation.splits.test[:].zero_()
        for x in evaluation.splits.test.batches(7): x.zero_()
        return Score(1.0)
        """,
        {"done", "failed"},
    ),
    "changes_storage": (
        """
        for value in vars(evaluation.splits.test).values():
            if isinstance(value, torch.Tensor): value.zero_()
        return Score(1.0)
        """,
        {"done", "failed"},
    ),
    "changes_samples": ("evaluation.samples.zero_()\nreturn Score(1.0)", {"done", "failed"}),
    "changes_model": (
        """
        for value in (*evaluation.model.buffers(), *evaluation.model.parameters()): value.zero_()
        return Score(1.0)
        """,
        {"done", "failed"},
    ),
    "changes_seed": ("torch.manual_seed(3)\nnp.random.seed(3)\nreturn Score(1.0)", {"done"}),
    "changes_threads": ("torch.set_num_threads(7)\nreturn Score(1.0)", {"done", "failed"}),
    "changes_type": (
        "torch.set_default_dtype(torch.float64)\nreturn Score(1.0)",
        {"done", "failed"},
    ),
}
"""What a metric does, and the statuses of its job that are honest."""

ARTIFACTS = {
    "raises": "raise RuntimeError('no picture')",
    "exits": "sys.exit(0)",
    "writes_outside": "(folder.parent / 'outside.txt').write_text('x')",
    "writes_absolute": "open(os.environ['TMPDIR'] + '/outside.txt', 'w').write('x')",
    "huge_name": "(folder / ('x' * 1000)).write_text('x')",
    "long_name": "(folder / ('x' * 250)).write_text('x')",
    "odd_name": r"(folder / 'a\nb\x1b[2J').write_text('x')",
    "name_not_text": r"open(os.fsencode(folder) + b'/\xff\xfe', 'w').write('x')",
    "deep": """
        for _ in range(60): folder = folder / ('d' * 50)
        folder.mkdir(parents=True)
        (folder / 'x').write_text('x')
    """,
    "many": "[(folder / str(i)).write_text('x') for i in range(3000)]",
    "link_to_itself": "(folder / 'link').symlink_to(folder / 'link')",
    "link_outside": "(folder / 'link').symlink_to('/etc/passwd')",
    "link_to_folder": "(folder / 'link').symlink_to('/proc', target_is_directory=True)",
    "pipe": "os.mkfifo(folder / 'pipe')",
    "not_readable": "(folder / 'x').write_text('x'); (folder / 'x').chmod(0)",
    "removes_folder": "folder.rmdir()",
    "writes_record": """
        job = next(p for p in folder.parents if (p / 'record.json').exists())
        (job / 'record.json').write_text('{}')
    """,
    "changes_samples": "evaluation.samples.zero_()",
}
"""What an artifact does; a job never fails by it."""

RESOLVES = {
    "raises": "raise RuntimeError('cannot')",
    "exits": "sys.exit(0)",
    "hangs": "sleep_for_ever()",
    "none": "return None",
    "text": "return 'nonsense'",
    "dies": "os._exit(0)",
}
SPACES = {
    "raises": "raise RuntimeError('no space')",
    "exits": "sys.exit(0)",
    "hangs": "sleep_for_ever()",
    "none": "return None",
    "odd_kind": "return Space('cube', (2,))",
    "empty_shape": "return Space('vector', ())",
    "negative_shape": "return Space('vector', (-2,))",
    "huge_shape": "return Space('vector', (10 ** 12,))",
}
LOADS = {
    "raises": "raise RuntimeError('no data')",
    "exits": "sys.exit(0)",
    "dies": "os._exit(0)",
    "hangs": "sleep_for_ever()",
    "segfaults": "segfault()",
    "none": "return None",
    "text": "return 'data'",
    "nan": "x = torch.full((60, 2), float('nan')); return Splits(*[Examples(x)] * 3)",
    "other_shape": "x = torch.rand(60, 3); return Splits(*[Examples(x)] * 3)",
    "nothing": "x = torch.rand(0, 2); return Splits(*[Examples(x)] * 3)",
    "always_other": "x = torch.rand(60, 2) + time.time(); return Splits(*[Examples(x)] * 3)",
}
MAY_PASS = ("empty_shape", "always_other")
"""What may be found out, or be taken as it is."""

FORGETS = _class(
    "Model",
    "forgets",
    """
    def fit(self, train, valid, context): self.mean = train[:].mean(0) + 100
    def sample(self, n, generator):
        return torch.rand(n, 2, generator=generator) + getattr(self, "mean", torch.zeros(2))
    def log_prob(self, x): return -(x - getattr(self, "mean", torch.zeros(2))).square().sum(1)
    """,
)
"""A model that keeps what it has learnt in no buffer: it is another one after it was loaded."""


def trials(lab: Lab) -> Iterator[Trial]:
    """Yield trials of what is bad at discovery, and of what is bad in a job."""
    for name, statement in AT_IMPORT.items():
        bad = Distribution("bad_import", f"{HEAD}\n{statement}\n")
        yield single(f"at import: {name}", partial(_discover, lab, bad, True))
    for name, statement in HARMLESS.items():
        bad = Distribution("odd_import", f"{HEAD}\n{statement}\n")
        yield single(f"at import: {name}", partial(_discover, lab, bad, False))
    for name, value in NAMES.items():
        bad = Distribution(
            "bad_name",
            f'{HEAD}\nclass Bad(Base):\n    """Bad."""\n    name = {value}\n'
            "\n@hookimpl\ndef imlbench_models(): return [Bad]\n",
        )
        yield single(f"name: {name}", partial(_discover, lab, bad, True))
    for name, statement in HOOKS.items():
        hook = f"@hookimpl\ndef imlbench_models(): {statement}\n"
        bad = Distribution("bad_hook", f"{HEAD}\n{hook}")
        yield single(f"hook: {name}", partial(_discover, lab, bad, True))
    yield single("hook: takes the name of another", partial(_refused, lab))
    yield from _model_trials(lab)
    for name, (statements, statuses) in METRICS.items():
        bad = _compute(name, statements)
        yield single(f"metric: {name}", partial(_measure, lab, bad, statuses))
    for name, statements in ARTIFACTS.items():
        yield single(f"artifact: {name}", partial(_show, lab, _write(name, statements)))
    for name, statement in RESOLVES.items():
        body = f"@classmethod\ndef resolve(cls, params, space): {statement}"
        bad = _class("Model", f"resolve_{name}", body)
        yield single(f"resolve: {name}", partial(_request, lab, bad, "--models"))
    for name, statement in SPACES.items():
        bad = _class("Dataset", f"space_{name}", f"@property\ndef space(self): {statement}")
        yield single(f"space: {name}", partial(_request, lab, bad, "--datasets"))
    for name, statement in LOADS.items():
        bad = _class("Dataset", f"load_{name}", f"def load(self, sources): {statement}")
        yield single(f"load: {name}", partial(_request, lab, bad, "--datasets"))


def _model_trials(lab: Lab) -> Iterator[Trial]:
    """Yield trials of a few bad models at once; those that are stopped by time apart."""
    bad = {f"fit: {n}": (_fit(f"fit_{n}", text), status) for n, (text, status) in FITS.items()}
    bad |= {
        f"sample: {n}": (_sample(f"sample_{n}", text), status)
        for n, (text, status) in SAMPLES.items()
    }
    bad["a model that forgets"] = (FORGETS, {"failed"})
    slow = {name: case for name, case in bad.items() if "timeout" in case[1]}
    quick = {name: case for name, case in bad.items() if name not in slow}
    for cases, limit in ((quick, ()), (slow, TIME_LIMIT)):
        names = list(cases)
        for start in range(0, len(names), 6):
            yield _fit_trial(lab, {n: cases[n] for n in names[start : start + 6]}, limit)


def _fit_trial(
    lab: Lab, cases: dict[str, tuple[Distribution, set[str]]], limit: Sequence[str]
) -> Trial:
    each = cases.items() if len(cases) > 1 else ()
    alone = [_fit_trial(lab, {name: case}, limit) for name, case in each]
    return Trial(tuple(cases), partial(_fit_beside, lab, cases, limit), tuple(alone))


def _with(command: Sequence[str], option: str, name: str) -> tuple[str, ...]:
    """Return a command with one more name in an option's list."""
    position = command.index(option) + 1
    return (*command[:position], f"{command[position]},{name}", *command[position + 1 :])


def _plugin_name(bad: Distribution) -> str:
    return "bad-" + bad.name.removeprefix("bad_")


def _discover(lab: Lab, bad: Distribution, is_told: bool, place: Place) -> list[Problem]:
    """Run good jobs beside a plugin that cannot be used."""
    truth = lab.truth(GOOD)
    bad.install(place.site)
    answer = place.imlbench(*GOOD, environment=PLUGIN_LIMIT, timeout=PATIENCE / 3)
    problems = [*judge_answer(answer, {0, 1})]
    problems += _escapes(answer)
    if is_told and not warns([answer], bad.name):
        problems.append(Problem(Kind.HIDDEN, f"no warning names {bad.name}"))
    return problems + judge_folder(place.results, truth)


def _refused(lab: Lab, place: Place) -> list[Problem]:
    """Ask for good jobs beside a plugin that contradicts another one."""
    hook = "@hookimpl\ndef imlbench_models(): return [type('Vae', (Base,), {'name': 'vae'})]\n"
    Distribution("bad_hook", f"{HEAD}\n{hook}").install(place.site)
    answer = place.imlbench(*GOOD, environment=PLUGIN_LIMIT)
    problems = [*judge_answer(answer, {2})]
    if "vae" not in answer.err:
        problems.append(Problem(Kind.HIDDEN, f"no message names 'vae': {answer.err[:200]}"))
    return problems


def _escapes(answer: Answer) -> Iterator[Problem]:
    """Yield a problem if text of a plugin's exceptions reaches the terminal as it is."""
    if "\x1b" in answer.err.replace("\x1b[2J garbage", ""):
        yield Problem(Kind.HIDDEN, "prints a plugin's control characters")


def _fit_beside(
    lab: Lab,
    cases: dict[str, tuple[Distribution, set[str]]],
    limit: Sequence[str],
    place: Place,
) -> dict[str, list[Problem]]:
    """Run good jobs and bad models together."""
    truth = lab.truth(GOOD)
    command: tuple[str, ...] = GOOD
    for bad, _ in cases.values():
        bad.install(place.site)
        command = _with(command, "--models", _plugin_name(bad))
    patience = PATIENCE if limit else PATIENCE / 3  # what is suspended has ten times the limit
    answer = place.imlbench(*command, *limit, timeout=patience)
    all_done = all(statuses == {"done"} for _, statuses in cases.values())
    codes = {0} if all_done else {0, 1} if _may_be_done(cases) else {1}
    problems = {"": [*judge_answer(answer, codes), *_escapes(answer)]}
    problems[""] += judge_folder(place.results, truth)
    for name, (bad, statuses) in cases.items():
        problems[name] = [*_judge_status(answer, place, _plugin_name(bad), statuses)]
    return problems


def _may_be_done(cases: dict[str, tuple[Distribution, set[str]]]) -> bool:
    return all("done" in statuses for _, statuses in cases.values())


def _judge_status(
    answer: Answer, place: Place, plugin: str, statuses: set[str]
) -> Iterator[Problem]:
    """Yield what is wrong with how a bad plugin's jobs ended, and what was said of it."""
    ended = {
        (str(record["status"]), str(record["reason"]))
        for record in read_records(place.results).values()
        if plugin in (record["model"], record["dataset"])
    }
    if not ended:
        yield Problem(Kind.HIDDEN, f"{plugin} has no record")
    for status, reason in ended:
        if status not in statuses:
            wanted = " or ".join(sorted(statuses))
            yield Problem(Kind.HIDDEN, f"{plugin} must be {wanted}; is {status}: {reason[:100]}")
        elif status != "done" and not (warns([answer], plugin) and reason):
            yield Problem(Kind.HIDDEN, f"no line says why {plugin} is {status}")


def _measure(lab: Lab, bad: Distribution, statuses: set[str], place: Place) -> list[Problem]:
    """Compute a bad metric before good ones; then the good ones alone."""
    truth = lab.truth(GOOD)
    bad.install(place.site)
    metric = _plugin_name(bad)
    limit = TIME_LIMIT if "timeout" in statuses else ()
    command = _with(GOOD, "--metrics", metric)
    answer = place.imlbench(*command, *limit, timeout=PATIENCE / 3)
    done = {str(record["status"]) for record in read_records(place.results).values()}
    problems = [*judge_answer(answer, {0 if done == {"done"} else 1}), *_escapes(answer)]
    if not done <= statuses:
        wanted = " or ".join(sorted(statuses))
        problems.append(Problem(Kind.HIDDEN, f"jobs must be {wanted}; are {', '.join(done)}"))
    after, _ = rerun(place, _beside(truth, place, metric))
    return problems + after


def _beside(truth: Truth, place: Place, metric: str) -> Truth:
    """Return the truth with the values of a bad metric, where there are any."""
    jobs = {}
    for job, scores in truth.jobs.items():
        jobs[job] = dict(scores)
        for found in read_records(place.results).get(job, {}).get("scores", []):  # type: ignore[attr-defined]
            if found["label"] == metric:
                key = (metric, found["draw"])
                jobs[job][key] = (found["value"], found["stderr"], found["n_examples"])
    return Truth(truth.arguments, jobs, truth.results, truth.seconds)


def _show(lab: Lab, bad: Distribution, place: Place) -> list[Problem]:
    """Run good jobs of which a bad artifact is made."""
    truth = lab.truth(GOOD)
    bad.install(place.site)
    answer = place.imlbench(*GOOD, timeout=PATIENCE / 3)
    problems = [*judge_answer(answer, {0, 1}), *_escapes(answer)]
    board = place.imlbench("leaderboard")
    problems += [*judge_answer(board, {0})]
    bad.uninstall(place.site)
    return problems + rerun(place, truth)[0]


def _request(lab: Lab, bad: Distribution, option: str, place: Place) -> list[Problem]:
    """Ask for good jobs and for a plugin that fails before any job, or as it loads data."""
    truth = lab.truth(GOOD)
    bad.install(place.site)
    plugin = _plugin_name(bad)
    answer = place.imlbench(
        *_with(GOOD, option, plugin), *TIME_LIMIT, environment=PLUGIN_LIMIT, timeout=PATIENCE / 3
    )
    codes = {0, 1} if bad.name.endswith(MAY_PASS) else {1}
    problems = [*judge_answer(answer, codes), *_escapes(answer)]
    if not warns([answer], plugin):
        problems.append(Problem(Kind.HIDDEN, f"no line names {plugin}: {answer.err[-200:]!r}"))
    return problems + judge_folder(place.results, truth)


CLASS = FaultClass(
    "plugins",
    "Distributions with one bad plugin each, installed beside good jobs: at import they raise, "
    "exit, hang, crash, or change the process; they have impossible names; their hooks, "
    "parameters, spaces and data fail; models fail, hang, crash, report nonsense or leave "
    "processes when they are fitted, and sample nonsense; metrics return nonsense or change what "
    "they are given; artifacts write where and what they must not.",
    "the good jobs are done with the scores of an undisturbed run; the bad one has an honest "
    "status, one line that says why, and no process that outlives the run.",
    trials,
)
