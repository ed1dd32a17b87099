"""Parameters as JSON values, and as a person reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from pydantic import JsonValue

Settings = dict[str, JsonValue]

MOST_NUMBERS = 10
"""Numbers that are listed one by one."""


def ranges(numbers: Iterable[int]) -> str:
    """Return integers as a person reads them; of many, those in a row by their ends.

    Example:
        >>> ranges([0, 1, 2]), ranges([*range(100), 200])
        ('0, 1, 2', '0..99, 200')
    """
    found = sorted(set(numbers))
    if len(found) <= MOST_NUMBERS:
        return ", ".join(map(str, found))
    told: list[list[int]] = []
    for number in found:
        if told and number == told[-1][-1] + 1:
            told[-1][-1] = number
        else:
            told.append([number, number])
    return ", ".join(f"{a}..{b}" if b > a else str(a) for a, b in told)


def assignments(settings: Mapping[str, JsonValue]) -> list[str]:
    """Return parameters as a person reads them.

    Example:
        >>> assignments({"latent_dim": 40, "backend": "torch", "classes": [0, 1]})
        ['latent_dim=40', 'backend=torch', 'classes=[0, 1]']
    """
    return [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
    ]
