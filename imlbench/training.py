"""The one training loop that plugins share, and the optimiser that suits most of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imlbench.api import Examples, FitContext
from imlbench.api.model import Stateful
from imlbench.errors import Diverged

MIN_STEPS_PER_EPOCH = 50
_PAYS = 1e8

Precision = Literal["auto", "float32", "bfloat16"]
"""Of the products within networks while they are trained; see :func:`train_epochs`."""


def batch_size_for(n_examples: int, batch_size: int) -> int:
    """Return the batch size to use: smaller on small data, so that an epoch has 50 steps.

    Example:
        >>> batch_size_for(55_000, 500), batch_size_for(1_300, 500)
        (500, 26)
    """
    return max(1, min(batch_size, n_examples // MIN_STEPS_PER_EPOCH))


def n_steps_for(n_examples: int, batch_size: int, n_epochs: int) -> int:
    """Return how many steps :func:`train_epochs` will take."""
    return n_epochs * (n_examples // batch_size_for(n_examples, batch_size))


def usual_precision(
    device: torch.device, modules: Iterable[nn.Module], batch_size: int
) -> Precision:
    """Return what ``"auto"`` stands for: bfloat16 where it was seen to pay, otherwise float32.

    That is on a processor that has units for it, where a batch is multiplied by a matrix so large
    that its conversion costs little beside: 10^8 multiplications. Smaller networks get slower;
    convolutions, and other devices, were not measured.

    Arguments:
        device: Where training takes place.
        modules: What is trained.
        batch_size: Examples per step.
    """
    parameters = (parameter for module in modules for parameter in module.parameters())
    largest = max((matrix.numel() for matrix in parameters if matrix.ndim == 2), default=0)
    pays = largest * batch_size >= _PAYS
    return "bfloat16" if device.type == "cpu" and pays and _has_bfloat16_units() else "float32"


def _has_bfloat16_units() -> bool:
    """Whether the processor multiplies bfloat16; older versions of torch cannot tell."""
    told: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(told.get("avx512_bf16") or told.get("amx_bf16"))


class OneCycleAdam:
    """Adam whose learning rate rises and falls once (https://arxiv.org/abs/1708.07120).

    Arguments:
        parameters: What to optimise.
        learning_rate: The peak.
        n_steps: How many steps there will be.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, n_steps: int
    ) -> None:
        self._optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, max_lr=learning_rate, total_steps=max(n_steps, 2)
        )

    def step(self, loss: Tensor) -> None:
        """Take one step down the gradient of ``loss``."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of Adam and of its schedule."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of an optimiser of the same parameters."""
        self._optimizer.load_state_dict(state_dict["optimizer"])
        self._schedule.load_state_dict(state_dict["schedule"])


def train_epochs(
    step: Callable[[Tensor], Mapping[str, Tensor]],
    data: Examples,
    *,
    n_epochs: int,
    batch_size: int,
    context: FitContext,
    stage: str,
    precision: Precision = "float32",
    parts: Sequence[Stateful | torch.Generator] = (),
    after_epoch: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> None:
    """Call ``step`` with shuffled batches, and report the mean of its values for every epoch.

    An interrupted fit goes on after the last epoch that was kept, if its ``parts`` are named.
    The values stay on the device until the epoch ends: no step waits for the host. The batch size
    and the number of steps that were used are recorded.

    Arguments:
        step: Takes the numbers (B,) of a batch's examples, reads what it needs, such as
            ``train[rows]`` and ``train.labels["digit"][rows]``, changes the parameters, and returns
            scalars to report, such as ``{"loss": loss}``.
        data: The training examples; incomplete last batches are left out.
        n_epochs: Passes over the data.
        batch_size: Examples per step; see :func:`batch_size_for`.
        context: Given to :meth:`Model.fit`.
        stage: The name under which progress is reported.
        precision: With ``"bfloat16"`` every step runs under :class:`torch.autocast`: matrix
            products and convolutions are rounded to 8 bits of mantissa; parameters, their updates
            and what the networks of :mod:`imlbench.networks` return stay float32. ``"auto"``: see
            :func:`usual_precision`; what was used is recorded.
        parts: What ``step`` and ``after_epoch`` change, such as the model and its optimiser; see
            :meth:`imlbench.FitContext.steps`.
        after_epoch: Called with the epoch, the number of epochs, and the values reported.

    Raises:
        Diverged: A reported value is NaN or infinite, or a factorisation that is checked failed.
    """
    size = batch_size_for(len(data), batch_size)
    if precision == "auto":
        modules = [part for part in parts if isinstance(part, nn.Module)]
        precision = usual_precision(context.device, modules, size)
    n_steps = n_steps_for(len(data), batch_size, n_epochs)
    context.record(batch_size=size, n_steps=n_steps, precision=precision)
    generator = context.generator(f"{stage} shuffle")
    rounded = torch.autocast(
        context.device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False
    )
    for epoch in context.steps(stage, n_epochs, *parts):
        batches = (rows for rows in data.shuffled(size, generator) if len(rows) == size)
        try:
            with rounded:
                means = _means(map(step, batches))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # what NaN in a factorisation comes to
            raise Diverged(stage, epoch, str(error).splitlines()[0]) from error
        context.report(stage, epoch, n_epochs, **means)
        if after_epoch is not None:
            after_epoch(epoch, n_epochs, means)


def _means(records: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the mean of every value over the records."""
    totals: dict[str, Tensor] = {}
    n_records = 0
    for values in records:
        n_records += 1
        for name, value in values.items():
            value = value.detach()
            totals[name] = totals[name] + value if name in totals else value
    return {name: (total / n_records).item() for name, total in totals.items()}
