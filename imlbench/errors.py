"""What can go wrong, as types: the user's mistakes, and the ways a job can fail."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: bad configuration, missing data, an unwritable folder.

    The command line prints the messages and exits with status 2, without a traceback.

    Arguments:
        messages: One or more messages, each of the form
            ``<where>: <what> must be <constraint>; got <value>. <remedy>``.
    """

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class DataError(UserError):
    """A dataset's files are missing, damaged or of another form than expected."""


class ParameterError(ValueError):
    """A parameter does not fit the data, said by a model before it trains.

    Arguments:
        parameter: The name of the parameter.
        problem: The rest of the sentence: ``must be …; got …. <remedy>``.
    """

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(f"{parameter} {problem}")
        self.parameter = parameter
        self.problem = problem


class Diverged(Exception):
    """Training left the finite numbers, or collapsed beyond recovery.

    Arguments:
        stage: What was being trained, such as ``"autoencoder"``.
        step: The epoch or iteration in which it was seen, counted from 1.
        reason: What was seen, such as ``"loss is nan"``.
    """

    def __init__(self, stage: str, step: int, reason: str) -> None:
        super().__init__(f"{stage}, epoch {step}: {reason}")
        self.stage, self.step, self.reason = stage, step, reason


ANYTHING = (Exception, SystemExit)
"""What somebody else's code can raise; Ctrl-C is the user's."""


def brief(error: BaseException, length: int = 2000) -> str:
    """Return an error as one line of printable characters: its type and what it says.

    Example:
        >>> brief(ValueError("no\x1b[2J\\nfile"))
        'ValueError: no [2J file'
    """
    return f"{type(error).__name__}: {plain(str(error), length)}".rstrip(": ")


def plain(text: str, length: int = 2000) -> str:
    """Return a text as one line, without what a terminal would obey."""
    printable = "".join(c if c.isprintable() else " " for c in text[: 4 * length])
    short = " ".join(printable.split())
    return short if len(short) <= length else f"{short[: length - 1]}…"


def last_line(text: str) -> str:
    """Return the last line of a text that says something; empty if none does."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Return ``unknown <what> 'name'.`` with the nearest name and the list of known ones.

    Example:
        >>> unknown("model", "vea", ["gan", "vae"])
        "unknown model 'vea'. Did you mean 'vae'? Known: gan, vae."
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown {what} '{name}'.{hint} Known: {', '.join(names) or 'none'}."
