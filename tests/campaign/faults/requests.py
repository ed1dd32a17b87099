"""Mistakes in the command line and in benchmarks.toml: each must be told in a message, at once."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.campaign.faults import FaultClass
from tests.campaign.oracle import Problem, files_in, judge_mistake
from tests.campaign.process import Place
from tests.campaign.trials import Lab, Trial, single

MOST_MEMORY = 4 * 2**30
"""Bytes that a command may have; half of it is too much already."""

RUN = ("run", "--models", "vae", "--datasets", "toy-2d")

CONTROL = {
    "escape": "\x1b[2J\x1b]0;owned\x07",
    "carriage return": "vae\rerror: all is well",
    "newline": "two\nlines",
    "backspace": "abc\b\b\b",
    "markup": "[bold red]x[/]",
    "right to left": "\u202egnp.exe",
    "emoji": "🙂" * 50,
    "combining": "a" + "\u0301" * 500,
    "surrogate": "\udcff\udcfe",
    "long": "x" * 20_000,
    "spaces": "   ",
    "quotes": "'\"`$(id)",
    "braces": "{0} {self.x} %s %n",
}
"""Texts that a terminal, a formatter or a shell could take for something else."""

NUMBERS = ("-1", "0", "1.5", "nan", "inf", "1e400", "abc", "", "0x10", "²", "9" * 400)
"""What no positive whole number is."""


@dataclass(frozen=True)
class Mistake:
    """A request that is wrong.

    Arguments:
        arguments: The command line.
        toml: The content of benchmarks.toml, if there is one.
        expected: What the message must hold.
    """

    arguments: tuple[str, ...]
    toml: bytes | None = None
    expected: str = ""


def _of_names() -> Iterator[Mistake]:
    """Yield names of nothing, plain and odd, wherever there are names."""
    for option in ("--models", "--datasets", "--metrics"):
        others = {"--models": "vae", "--datasets": "toy-2d"}
        odd = CONTROL.values() if option == "--models" else [CONTROL["escape"], CONTROL["long"]]
        for name in ("vea", "nothing-*", "[", "../../etc", *odd):
            given = {**others, option: name}
            yield Mistake(("run", *(part for pair in given.items() for part in pair)))
    for name in ("nothing", "demoo", "", *CONTROL.values()):
        yield Mistake(("run", name))
        yield Mistake(("plugins", name)) if name else Mistake(("plan", "nothing"))
    for name in CONTROL.values():
        yield Mistake((*RUN, "--set", f"{name}=1"))
    for name in ("escape", "right to left", "surrogate", "long"):
        yield Mistake((*RUN, "--device", CONTROL[name]))


def _of_numbers() -> Iterator[Mistake]:
    """Yield numbers that are none, too small, or far too large."""
    for option in ("--n-samples", "--n-draws", "--time-limit"):
        for number in NUMBERS:
            if not (option == "--time-limit" and number in ("1.5", "inf", "1e400", "9" * 400)):
                yield Mistake((*RUN, option, number))
    for number in NUMBERS:
        if number != "0":
            yield Mistake((*RUN, "--seeds", number))
    for seeds in (
        *("0..99999999", "0..9999999999999999999999", "5..1", "..", "0..", "1..2..3", "0,,1"),
        *("-3..3", "0;1", "0..1e9", "1,0..99999999", "4294967296", "2147483648"),
    ):
        yield Mistake((*RUN, "--seeds", seeds), expected="--seeds")
    for name in ("vae.epochs", "vae.latent_dim", "toy-2d.n_train"):
        for number in ("-1", "0", "1.5", "nan", "abc", "true", "[1]", "{a=1}", "9" * 400):
            yield Mistake((*RUN, "--set", f"{name}={number}"))
    for text in (
        *("epochs", "=1", "epochs=", "vae.=1", ".epochs=1", "vae..epochs=1", "a.b.c.d=1", "="),
        *("epochs=1,,2", "nothing=1", "nothing.epochs=1", "gan.epochs=1", "vae.nothing=1"),
        *("toy-2d.shape=cube", "learning_rate=-1", "learning_rate=nan", "epochs=[1,", "epochs='"),
    ):
        yield Mistake((*RUN, "--set", text))


def _of_grids() -> Iterator[Mistake]:
    """Yield grids whose product nobody can want; they must be refused without being built."""
    values = ",".join(map(str, range(1, 1001)))
    axes = ("vae.latent_dim", "vae.epochs", "vae.hidden_dim", "vae.batch_size", "toy-2d.n_train")
    for n in (3, 4, 5):
        sets = [part for axis in axes[:n] for part in ("--set", f"{axis}={values}")]
        yield Mistake((*RUN, *sets))
        yield Mistake(("plan", *RUN[1:], *sets))
    yield Mistake((*RUN, "--seeds", "0..9999", "--set", f"vae.epochs={values}"))


def _of_options() -> Iterator[Mistake]:
    """Yield options that are unknown, lack something, or contradict each other."""
    for arguments in (
        *(("run",), ("run", "--models", "vae"), ("run", "--datasets", "toy-2d"), ("nothing",)),
        *((*RUN, "--nothing"), (*RUN, "extra", "extra"), (*RUN, "--seeds"), (*RUN, "--device", "")),
        *((*RUN, "--device", "tpu"), (*RUN, "--device", "cuda:99"), (*RUN, "--device", "cpu,,cpu")),
        *((*RUN, "--device", "cuda:-1"), (*RUN, "--models", ""), (*RUN, "--datasets", ",,,")),
        *((*RUN, "--config", "none.toml"), (*RUN, "--config", "/"), (*RUN, "--config", "")),
        ("run", "--models", "iml-hmm", "--datasets", "toy-2d"),
        ("run", "--models", "vae", "--datasets", "mnist", "--offline"),
        (*RUN, "--metrics", "kde_pairs", "--set", "kde_pairs.h=-1"),
        ("leaderboard", "--format", "pdf"),
        ("leaderboard", "--results", "none"),
        ("leaderboard", "--tracking", "sqlite:///none.db"),
        ("leaderboard", "--tracking", "nonsense"),
        ("leaderboard", "--metric", "kde"),
        ("leaderboard", "extra"),
        *(("rm",), ("rm", "--models", "vae"), ("rm", "../../etc"), ("rm", "--nothing"), ("gc",)),
        *(("gc", "extra"), ("gc", "--results", "/dev/null"), ("plugins", "vae", "gan")),
    ):
        yield Mistake(arguments)


def _of_places() -> Iterator[Mistake]:
    """Yield results folders, data and files that cannot be what they are said to be."""
    for place in (
        *("/dev/null", "/dev/null/x", "/proc/nowhere", "/proc/self/mem", "/sys/nowhere", "file"),
        *("file/below", "x" * 300, "/".join(["x" * 200] * 40), "loop", "loop/below"),
    ):
        yield Mistake((*RUN, "--results", place))
        yield Mistake(("leaderboard", "--results", place))
    for place in ("file", "loop", "x" * 300):
        for dataset in ("mnist", "celeba", "spoken-digits", "violin"):
            command = ("run", "--models", "reference-train", "--datasets", dataset)
            yield Mistake((*command, "--offline", "--data-dir", place))
    for place in ("none.wav", "/dev/null", "/", "file", "loop"):
        path = f"violin.path={place}"
        yield Mistake(("run", "--models", "vae", "--datasets", "violin", "--set", path))


TOML: dict[str, bytes] = {
    "not TOML": b"what is this?",
    "half a table": b"[benchmarks.a",
    "no value": b"[benchmarks.a]\nmodels =",
    "twice the same key": b"[benchmarks.a]\nmodels = ['vae']\nmodels = ['gan']",
    "binary": bytes(range(256)),
    "null bytes": b"\0" * 100,
    "UTF-16": "[benchmarks.a]\nmodels = ['vae']".encode("utf-16"),
    "Latin-1": "[benchmarks.a]\ndescription = 'é'".encode("latin-1"),
    "deeply nested list": b"x = " + b"[" * 100_000,
    "deeply nested tables": b"[" + b".".join([b"a"] * 5_000) + b"]\n",
    "deeply nested setting": b"[benchmarks.a.set]\nx = " + b"{a=" * 5_000,
    "a million lines": b"x = 1\n" * 10**6,
    "a megabyte in a word": b"x" * 10**6 + b" = 1",
    "huge number": b"[benchmarks.a]\nn_samples = " + b"9" * 10_000,
    "unknown table": b"[benchmark.a]\nmodels = ['vae']",
    "unknown key": b"[benchmarks.a]\nmodel = ['vae']",
    "escape in a key": b'[benchmarks.a]\n"\\u001b[2J" = 1',
    "escape in a name": b'[benchmarks.a]\nmodels = ["\\u001b[2J"]\ndatasets = ["toy-2d"]',
    "escape in a benchmark": b'[benchmarks."\\u001b[2J"]\nmodel = 1',
    "models a string": b"[benchmarks.a]\nmodels = 'vae'",
    "models a number": b"[benchmarks.a]\nmodels = 7",
    "models empty": b"[benchmarks.a]\nmodels = []\ndatasets = ['toy-2d']",
    "models of numbers": b"[benchmarks.a]\nmodels = [1, 2]",
    "models a table": b"[benchmarks.a.models]\nvae = 1",
    "seeds a word": b"[benchmarks.a]\nseeds = 'many'",
    "seeds negative": b"[benchmarks.a]\nseeds = [-1]",
    "seeds huge": b"[benchmarks.a]\nseeds = '0..99999999'",
    "seeds a float": b"[benchmarks.a]\nseeds = [0.5]",
    "n_samples a string": b"[benchmarks.a]\nn_samples = 'many'",
    "n_samples one": b"[benchmarks.a]\nn_samples = 1",
    "n_draws zero": b"[benchmarks.a]\nn_draws = 0",
    "n_draws nan": b"[benchmarks.a]\nn_draws = nan",
    "set a list": b"[benchmarks.a]\nset = [1]",
    "grid no list": b"[benchmarks.a]\ngrid = { epochs = 3 }",
    "grid empty": b"[benchmarks.a]\ngrid = { epochs = [] }",
    "set without a name": b"[benchmarks.a]\nset = { 'vae.' = 1 }",
    "set a date": (
        b"[benchmarks.a]\nmodels=['vae']\ndatasets=['toy-2d']\nset = {epochs = 1979-05-27}"
    ),
    "description a number": b"[benchmarks.a]\ndescription = 7",
    "defaults wrong": b"[defaults]\nnothing = 1\n[benchmarks.a]\nmodels = ['vae']",
    "defaults a list": b"defaults = [1]",
    "benchmarks a list": b"benchmarks = ['a']",
    "benchmark a number": b"[benchmarks]\na = 7",
    "published wrong": b"[published.mnist.kde]\nx = 'high'",
    "unknown model": b"[benchmarks.a]\nmodels = ['vea']\ndatasets = ['toy-2d']",
    "no models": b"[benchmarks.a]\ndatasets = ['toy-2d']",
    "unknown parameter": (
        b"[benchmarks.a]\nmodels=['vae']\ndatasets=['toy-2d']\nset={vae={nothing=1}}"
    ),
    "wrong parameter": (
        b"[benchmarks.a]\nmodels=['vae']\ndatasets=['toy-2d']\nset={vae={epochs='x'}}"
    ),
    "no such benchmark": b"[benchmarks.b]\nmodels = ['vae']",
    "empty file": b"",
}


def mistakes() -> Iterator[Mistake]:
    """Yield all mistakes, each once."""
    seen = set()
    for source in (_of_names, _of_numbers, _of_grids, _of_options, _of_places):
        for mistake in source():
            if mistake not in seen:
                seen.add(mistake)
                yield mistake


def trials(lab: Lab) -> Iterator[Trial]:
    """Yield a trial for every mistake."""
    for mistake in mistakes():
        name = " ".join(ascii(part)[1:-1][:60] for part in mistake.arguments)
        yield single(f"{name} ({len(' '.join(mistake.arguments))})", partial(_ask, mistake))
    for name, toml in TOML.items():
        yield single(f"benchmarks.toml: {name}", partial(_ask, Mistake(("run", "a"), toml)))
    oddities: dict[str, Callable[[Path], object]] = {
        "a folder": Path.mkdir,
        "a link to itself": lambda path: path.symlink_to(path),
        "a link to nothing": lambda path: path.symlink_to("none"),
        "endless": lambda path: path.symlink_to("/dev/zero"),
        "the memory of a process": lambda path: path.symlink_to("/proc/self/mem"),
    }
    for name, make in oddities.items():
        yield single(f"benchmarks.toml: {name}", partial(_ask_with, make))


def _limit_memory() -> None:
    """Let what asks for far too much fail, before it takes the machine's memory from others."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY,) * 2)


def _ask(mistake: Mistake, place: Place) -> list[Problem]:
    if mistake.toml is not None:
        (place.work / "benchmarks.toml").write_bytes(mistake.toml)
    (place.work / "file").write_text("a file\n")
    (place.work / "loop").symlink_to("loop")
    before = files_in(place.work)
    answer = place.imlbench(*mistake.arguments, before=_limit_memory)
    return list(judge_mistake(answer, place, before, mistake.expected))


def _ask_with(make: Callable[[Path], object], place: Place) -> list[Problem]:
    """Name a file of benchmarks that is none, and must be left after little of it was read."""
    make(place.work / "odd.toml")
    before = files_in(place.work)
    answer = place.imlbench("run", "a", "--config", "odd.toml", before=_limit_memory)
    return list(judge_mistake(answer, place, before))


CLASS = FaultClass(
    "requests",
    "Mistakes in the command line and in benchmarks.toml: unknown and odd names, with control "
    "characters in them, wrong and huge numbers, ranges and grids, malformed, binary and deeply "
    "nested TOML, impossible folders, options that contradict each other.",
    "exit status 2, a message, nothing written, within a minute and 2 GB, and no control "
    "character of the request in the message.",
    trials,
)
