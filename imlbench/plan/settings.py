"""Parameters as JSON values, and as a person reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import JsonValue

Settings = dict[str, JsonValue]


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
