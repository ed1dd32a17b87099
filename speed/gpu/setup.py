"""Where the pieces compute and write, and what a reader needs to know about it."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from imlbench.runner.provenance import environment, processor
from speed.gpu.work import convolutions_are_rounded, products_are_rounded

QUICK = Path("results/gpu-quick")


@dataclass(frozen=True)
class Setup:
    """Where to compute, and how much.

    Arguments:
        device: One device.
        quick: Whether everything is only tried, as small as can be; then all is written elsewhere.
    """

    device: torch.device
    quick: bool = False

    @property
    def results(self) -> Path:
        """The folder of everything that is not a table."""
        return QUICK if self.quick else Path("results/gpu")

    def table(self, path: str) -> Path:
        """Return where a table is written."""
        return QUICK / Path(path).name if self.quick else Path(path)


def facts(device: torch.device) -> str:
    """Return a table of the device, the software, and the precision that is used."""
    used = environment(device)
    found = {
        "device": used.device,
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "imlbench": f"{used.imlbench} {used.git_commit}".strip(),
        "torch": used.torch,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "products of float32": "TF32" if products_are_rounded() else "float32",
        "convolutions of float32": "float32",
        "training": "as the parameter `precision` says; by default float32, as above",
        "densities": "products of float32 or float64, sums in float64",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] += f", {properties.total_memory / 2**30:.0f} GiB"
        found["torch"] += f", cuDNN {torch.backends.cudnn.version()}"
        if convolutions_are_rounded():
            found["convolutions of float32"] = "TF32"
    return tabulate(found.items(), ("", ""), "github", disable_numparse=True)
