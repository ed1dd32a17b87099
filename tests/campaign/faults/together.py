"""Several commands at once on one results folder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

from tests.campaign.faults import FaultClass
from tests.campaign.faults.files import SHARING
from tests.campaign.oracle import Problem, judge_answer, judge_folder, rerun
from tests.campaign.process import Place
from tests.campaign.trials import BASIC, Lab, Trial, single

REPEATS = 4

Command = tuple[str, ...]


def _of_models(command: Command, models: str) -> Command:
    """Return a command with other models."""
    start = command.index("--models")
    return (*command[: start + 1], models, *command[start + 2 :])


def trials(lab: Lab) -> Iterator[Trial]:
    """Yield every scene a few times, with the commands started up to a second apart."""
    board, gc = ("leaderboard",), ("gc",)
    shared = ("iml-gaussian,reference-train", "iml-gmm,reference-train")
    scenes: dict[str, tuple[Command, Sequence[Command]]] = {
        "four runs": (BASIC, [BASIC] * 4),
        "four runs and four leaderboards": (BASIC, [BASIC, board] * 4),
        "two runs, one of them with --force": (BASIC, [BASIC, (*BASIC, "--force")]),
        "two benchmarks that share a stage": (SHARING, [_of_models(SHARING, m) for m in shared]),
        "a run and gc": (SHARING, [SHARING, gc, gc, gc]),
    }
    chance = lab.random("together")
    for name, (whole, commands) in scenes.items():
        for number in lab.times(REPEATS):
            delays = [chance.random() for _ in commands]
            run = partial(_run, lab, whole, commands, delays)
            yield single(f"{name}, {number + 1}", run, everywhere=True)


def _run(
    lab: Lab, whole: Command, commands: Sequence[Command], delays: Sequence[float], place: Place
) -> list[Problem]:
    truth = lab.truth(whole)
    running = []
    for command, delay in zip(commands, delays, strict=True):
        running.append(place.start(*command))
        time.sleep(delay)
    problems: list[Problem] = []
    for command, process in zip(commands, running, strict=True):
        # What reads or tidies a folder that is not there yet says so.
        codes = {0} if command[0] == "run" else {0, 2}
        problems += judge_answer(process.wait(), codes)
    problems += judge_folder(place.results, truth)
    return problems + rerun(place, truth)[0]


CLASS = FaultClass(
    "together",
    "Four runs of the same jobs at once on a new folder; the same with four leaderboards; two runs "
    "of which one has --force; two runs that share a stage; a run and gc three times.",
    "every command ends well, and every job is there once, with the scores of an undisturbed run.",
    trials,
)
