"""A pretend accelerator, ``sim:0``, for machines without one: the CPU computes for it.

What goes wrong on a real one goes wrong here: tensors of two devices that meet, a generator of the
wrong device, ``.numpy()`` of a tensor that is not on the CPU. What makes a real one slow is
counted: waiting of the host, and launches of kernels. It says nothing about speed, memory and
rounding.

DLPack describes a tensor by where its memory is, and the pretence is to write another device into
that description: the same memory is a tensor of the CPU and one of the device. PyTorch keeps a name
for devices of others, PrivateUse1; it sends whatever is to be computed there to one function, which
computes on the CPU's tensors.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo  # optimisers import it, and annotations in it need the true Generator
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils.dlpack import from_dlpack, to_dlpack

if torch.__version__ < "2.10":
    pytest.skip("the pretend accelerator needs torch 2.10 or newer", allow_module_level=True)

from torch.utils.backend_registration import _DummyBackendModule
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as _setup

CPU, DEVICE = torch.device("cpu"), "sim:0"

_DEVICE_TYPES = {"cpu": 1, "sim": 12}  # in DLPack's description
_NOT_OURS = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), __file__)
_OF_THE_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # metadata are treated alike
_aten = torch.ops.aten

_WAITING = {
    _aten._linalg_check_errors,
    _aten._linalg_eigh,
    _aten._linalg_svd,
    _aten._local_scalar_dense,
    _aten._unique2,
    _aten.bincount,
    _aten.equal,
    _aten.masked_select,
    _aten.nonzero,
    _aten.unique_consecutive,
    _aten.unique_dim,
}
"""Operators whose result, or the shape of it, or an error, the host waits for."""
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_ALLOCATION = {_aten.empty, _aten.empty_strided, _aten.resize_}


@dataclass
class Log:
    """What a device was asked to do.

    Arguments:
        waits: How often the host had to wait for the device, by operator and line.
        n_launches: Calls that are one kernel at least; a real device fuses some of them.
    """

    waits: Counter[str] = field(default_factory=Counter)
    n_launches: int = 0


@contextmanager
def accelerator(*, float64: bool = True) -> Iterator[Log]:
    """Offer the device ``sim:0`` inside the block, and log what is asked of it.

    Generators of the device have to be made inside the block, too.

    Arguments:
        float64: Whether the device has float64; Apple's has not.
    """
    _name_the_device()
    log = Log()
    compute = functools.partial(_compute, log, float64)
    everything, operators = (torch.library.Library(name, "IMPL") for name in ("_", "aten"))
    everything.fallback(compute, "PrivateUse1")
    for packet in (_aten.convolution_overrideable, _aten.convolution_backward_overrideable):
        function = functools.partial(compute, packet.default)
        operators.impl(packet.default, function, "PrivateUse1")
    try:
        with (
            mock.patch("torch.Generator", _Generator),
            torch.autograd.set_multithreading_enabled(False),  # so that backward has a caller
            _GeneratorsFit(),
        ):
            yield log
    finally:
        everything._destroy()
        operators._destroy()


@functools.cache
def _name_the_device() -> None:
    """Give PrivateUse1 a name, for the rest of the process; outside of blocks it can do nothing."""
    _setup("sim", _Module())


class _Module(_DummyBackendModule):
    """What is ``torch.cuda`` for another device, which here has no global random state."""

    def get_rng_state(self, device: object) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: object) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _same_memory(tensor: Tensor, device_type: str) -> Tensor:
    """Return a tensor that says it is on another device."""
    capsule = to_dlpack(tensor)
    address = _pointer(capsule, b"dltensor")
    ctypes.c_int32.from_address(address + ctypes.sizeof(ctypes.c_void_p)).value = _DEVICE_TYPES[
        device_type
    ]
    found: Tensor = from_dlpack(capsule)
    return found


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _compute(log: Log, float64: bool, func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Carry out an operator of which an argument, or the result, is on the device."""
    packet = func.overloadpacket
    if func.is_view or packet is _aten.set_:
        return func.redispatch(_OF_THE_CPU, *args, **kwargs)
    if waits := _waits(packet, args):
        log.waits[f"{packet.__name__}, {_where()}"] += waits
    log.n_launches += packet not in _ALLOCATION
    given: dict[int, tuple[Tensor, Tensor]] = {}

    def to_host(tensor: Tensor) -> Tensor:
        host = _on_host(tensor)
        given[id(host)] = host, tensor
        return host

    def to_device(tensor: Tensor) -> Tensor:
        if id(tensor) in given:
            return given[id(tensor)][1]
        if tensor.dtype == torch.float64 and not float64:
            raise TypeError(f"{func}: {DEVICE} has no float64")
        return _same_memory(tensor, "sim")

    host_args = _with_tensors(args, to_host)
    host_kwargs = {name: _with_tensors(value, to_host) for name, value in kwargs.items()}
    if "device" in kwargs:
        host_kwargs["device"] = CPU
    _refuse_strangers(func, args, [tensor for _, tensor in given.values()])
    found = _OWN.get(packet, func)(*host_args, **host_kwargs)
    for host, tensor in given.values():
        if host.shape != tensor.shape:  # resized: its memory goes, which the host may share
            _aten.set_.source_Tensor.redispatch(
                _OF_THE_CPU, tensor, _same_memory(host.clone(), "sim")
            )
    return _with_tensors(found, to_device)


def _with_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with the function of each tensor in its place, also within lists."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([_with_tensors(part, function) for part in value])
    return value


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.device == CPU:
        return tensor
    if not tensor.numel():  # nothing to share, and memory of others cannot grow
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return _same_memory(tensor, "cpu")


def _refuse_strangers(func: OpOverload, args: tuple[Any, ...], given: Iterable[Tensor]) -> None:
    """Raise if tensors of two devices meet; the CPU's scalars may meet all, and be indices."""
    if func.overloadpacket is _aten._copy_from:
        return
    indices = {id(index) for index in args[1]} if func.overloadpacket in _INDEXING else set()
    strangers = [each for each in given if each.device == CPU and each.ndim]
    shapes = [str(tuple(each.shape)) for each in strangers if id(each) not in indices]
    if shapes:
        raise RuntimeError(
            f"{func}: Expected all tensors to be on the same device, but found at least two "
            f"devices, {DEVICE} and cpu! On the CPU: {', '.join(shapes)}"
        )


def _waits(packet: Any, args: tuple[Any, ...]) -> int:
    """Return how often the host waits for an operator."""
    if packet is _aten._copy_from:
        source, target, non_blocking = (*args, False)[:3]
        return source.device != target.device and not non_blocking
    if packet is _aten.multinomial:  # probabilities are looked at, but for draws with replacement
        n_samples, replacement = (*args[1:], False)[:2]
        return 2 * (n_samples == 1 or not replacement)
    if packet is _aten._index_put_impl_:
        return args[2].numel() > 1 and sum(map(_waits_for_index, args[1]))
    return packet in _WAITING


def _waits_for_index(index: Tensor | None) -> bool:
    """Whether an index has to be copied to the device, or is a mask whose trues are counted."""
    return index is not None and (index.device == CPU or index.dtype in (torch.bool, torch.uint8))


def _where() -> str:
    """Return the line of our code that is being carried out."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_filename.startswith(_NOT_OURS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


class _Generator(torch.Generator):
    """A generator of the CPU that may say that it is of the device."""

    _device: torch.device

    def __new__(cls, device: torch.device | str = "cpu") -> _Generator:
        self = super().__new__(cls)
        self._device = CPU if torch.device(device) == CPU else torch.device(DEVICE)
        return self

    @property
    def device(self) -> torch.device:
        return self._device


class _GeneratorsFit(TorchFunctionMode):
    """Refuses generators of another device than what they are to fill."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None:
            tensors = (each for each in args if isinstance(each, Tensor))
            device = kwargs.get("device") or next((each.device for each in tensors), CPU)
            wanted, found = torch.device(device).type, generator.device.type
            if wanted != found:
                raise RuntimeError(
                    f"{func.__name__}: Expected a '{wanted}' device type for generator but found "
                    f"'{found}'"
                )
        return func(*args, **kwargs)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return target.copy_(source)


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *how: Any) -> Any:
    return _aten.convolution_backward(gradient, x, weight, gradient.shape[1:2], *how)


def _put(operator: OpOverload, *args: Any, out: Tensor) -> Tensor:
    """Put a result where it is wanted, for operators that need memory there that can grow."""
    found = operator(*args)
    assert found.shape == out.shape
    return out.copy_(found)


def _gru_cell(
    from_input: Tensor,
    from_state: Tensor,
    state: Tensor,
    input_bias: Tensor | None = None,
    state_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the new state of a recurrent unit, which devices compute by one kernel."""
    if input_bias is not None and state_bias is not None:
        from_input, from_state = from_input + input_bias, from_state + state_bias
    reset, update, new = from_input.chunk(3, dim=1)
    reset_state, update_state, new_state = from_state.chunk(3, dim=1)
    new = (new + new_state * (reset + reset_state).sigmoid()).tanh()
    found = (state - new) * (update + update_state).sigmoid() + new
    return found, torch.cat([from_input, from_state, state], dim=1)


def _gru_cell_backward(gradient: Tensor, kept: Tensor, has_bias: bool) -> tuple[Tensor | None, ...]:
    n_units = gradient.shape[1]
    parts = kept.split([3 * n_units, 3 * n_units, n_units], dim=1)
    of_input, of_state, of_before, *_ = _aten._thnn_differentiable_gru_cell_backward(
        gradient, *parts, None, None
    )
    biases = (of_input.sum(0), of_state.sum(0)) if has_bias else (None, None)
    return (of_input, of_state, of_before, *biases)


_OWN: dict[Any, Callable[..., Any]] = {
    _aten._copy_from: _copy_from,
    _aten.convolution_overrideable: _aten.convolution,
    _aten.convolution_backward_overrideable: _convolution_backward,
    _aten.mse_loss: functools.partial(_put, _aten.mse_loss.default),
    _aten.smooth_l1_loss: functools.partial(_put, _aten.smooth_l1_loss.default),
    _aten._thnn_fused_gru_cell: _gru_cell,
    _aten._thnn_fused_gru_cell_backward: _gru_cell_backward,
}
"""Operators that the CPU lacks, or that it computes otherwise."""
