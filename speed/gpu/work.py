"""How much of a device's speed a computation uses: its products, beside bare ones."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from speed.measure import seconds

aten = torch.ops.aten
CONVOLUTIONS = {aten.convolution, aten.convolution_backward}


class Products(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions, inside the block.

    Factorisations, triangular solves and everything element by element count nothing.

    Attributes:
        operations: How many, by the precision that they are computed in.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in flop_registry:
            first = next(arg for arg in args if isinstance(arg, Tensor))
            n_operations = flop_registry[packet](*args, **kwargs, out_val=found)
            self.operations[precision(first, packet in CONVOLUTIONS)] += n_operations
        return found


def precision(x: Tensor, is_convolution: bool) -> str:
    """Return the precision of a product with a tensor: its type, or ``"tf32"``."""
    rounds = convolutions_are_rounded() if is_convolution else products_are_rounded()
    if x.dtype == torch.float32 and x.device.type == "cuda" and rounds:
        return "tf32"
    return str(x.dtype).removeprefix("torch.")


def products_are_rounded() -> bool:
    """Whether a CUDA device may round factors of float32 to TF32."""
    return torch.get_float32_matmul_precision() != "highest"


def convolutions_are_rounded() -> bool:
    """Whether a CUDA device may round what is convolved from float32 to TF32."""
    return bool(torch.backends.cudnn.allow_tf32)


@functools.cache
def peak(name: str, device: torch.device) -> float:
    """Return how many operations a second a large square product makes on a device.

    Arguments:
        name: A precision, see :func:`precision`.
        device: The device.
    """
    n = 8192 if device.type == "cuda" else 512
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    x = torch.rand(n, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with _rounded("high" if name == "tf32" else "highest"):
        product = synchronised(lambda: x @ x, device)
        product()
        return 2 * n**3 / min(seconds(product) for _ in range(10))


@contextmanager
def _rounded(how: str) -> Iterator[None]:
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(how)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(former)


def seconds_at_peak(operations: Mapping[str, float], device: torch.device) -> float:
    """Return how long products take if each is as fast as a large one of its precision."""
    return sum(n / peak(name, device) for name, n in operations.items())


def synchronised(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Return a function that ends when a device has done what it was told."""

    def run() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
