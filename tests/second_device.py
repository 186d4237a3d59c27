"""A second device on a machine that has none: it keeps its tensors in main memory and refuses what a GPU would refuse.

Inside `with SecondDevice():` every tensor lives on "cpu" or on `DEVICE`. `.device`, `.to(...)`, `.cpu()` and new tensors
with `device=` behave as with a real device, values and gradients are the CPU's own. An operation whose operands live
on both raises, except where CUDA allows it: numbers (tensors without dimensions), indices on the CPU, and copies. So
does `.numpy()`, drawing random numbers there with a generator of the CPU and, under deterministic algorithms, what CUDA
cannot do in a fixed order.

Where a tensor lives is known by its storage, so views follow their base. PyTorch's own C++ code makes tensors on the
device of what it was given, which cannot be seen from Python: such tensors may meet either kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("privateuseone", 0)
_CPU = torch.device("cpu")
_EITHER = None  # made by C++ code, where it is not known

_aten = torch.ops.aten
# What may bring tensors of two devices together, and how many of its operands then have to agree.
_COPIES = {_aten.copy_.default, _aten._to_copy.default, _aten._local_scalar_dense.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
# What CUDA has in no deterministic form, of what could be used here (see torch.use_deterministic_algorithms).
_UNORDERED = {
    _aten.cumsum.default, _aten.cumsum.out, _aten.nll_loss2d_forward.default, _aten.median.dim, _aten.kthvalue.default,
    _aten.histc.default, _aten.put_.default, _aten.scatter_reduce.two,
}  # fmt: skip
_DEVICE, _IS_CPU = torch.Tensor.device.__get__, torch.Tensor.is_cpu.__get__
_MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.type_as}


class MisplacedError(RuntimeError):
    """Tensors of two devices met."""


class _Places:
    """Where every storage lives."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[StorageWeakRef, torch.device | None]] = {}

    def __getitem__(self, tensor: Tensor) -> torch.device | None:
        if tensor.is_meta:
            return tensor.device
        found = self.known.get(_storage(tensor))
        return _CPU if found is None or found[0].expired() else found[1]

    def __setitem__(self, tensor: Tensor, place: torch.device | None) -> None:
        key = _storage(tensor)
        if not key:
            return
        if len(self.known) > 200_000:
            self.known = {k: v for k, v in self.known.items() if not v[0].expired()}
        # The reference keeps the address from being given to another storage.
        self.known[key] = (StorageWeakRef(tensor.untyped_storage()), place)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


class _Follow(TorchDispatchMode):
    """Checks the operands of every operation and says where its results live."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places
        self.made: torch.device | None = _EITHER

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.is_meta for t in given):
            return func(*args, **(kwargs or {}))
        place = self._meeting(func, args, given)
        unordered = func in _UNORDERED and place == DEVICE and given[0].is_floating_point()
        if unordered and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{func} does not have a deterministic implementation on {DEVICE.type}")
        before = {_storage(t) for t in given}
        out = func(*args, **(kwargs or {}))
        if given and place is not _EITHER and func._schema.is_mutable and self.places[given[0]] is _EITHER:
            self.places[given[0]] = place
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _storage(tensor) not in before:
                self.places[tensor] = place
        return out

    def _meeting(self, func: Any, args: Any, given: list[Tensor]) -> torch.device | None:
        """Where the result lives."""
        if not given:
            return self.made
        first = self.places[given[0]]
        if func in _COPIES:
            return first
        if func in _INDEXED:
            indices = [i for i in args[1] if isinstance(i, Tensor)]
            if first == _CPU and any(self.places[i] == DEVICE for i in indices):
                raise MisplacedError(
                    f"{func}: indices should be either on cpu or on the device of the indexed tensor (cpu)"
                )
            given = [t for t in given if not any(t is i for i in indices)]
        lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
        listed = bool(lists) and func not in _INDEXED
        whole = {self.places[t] for t in given if t.ndim or listed} - {_EITHER}
        single = {self.places[t] for t in given if not t.ndim and not listed} - {_EITHER}
        if func._schema.is_mutable and first == _CPU and DEVICE in single and func not in _INDEXED:
            whole = whole | {first, DEVICE}
        if len(whole) > 1 or (whole == {_CPU} and DEVICE in single and func not in _INDEXED):
            shown = ", ".join(f"{tuple(t.shape)} on {self.places[t]}" for t in given)
            raise MisplacedError(f"{func}: expected all tensors to be on the same device, but got {shown}")
        every = whole or single
        return DEVICE if DEVICE in every | single else _CPU if every else _EITHER


class _Moved(torch.autograd.Function):
    """A copy on the other device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places: _Places, place: torch.device | None) -> Tensor:
        ctx.places, ctx.place = places, places[tensor]
        out = tensor.clone()
        places[out] = place
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        out = grads[0].clone()
        ctx.places[out] = ctx.place
        return out, None, None


class SecondDevice(TorchFunctionMode):
    """The mode; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self.places = _Places()
        self.follow = _Follow(self.places)
        self.constructors = set(_device_constructors())

    def __enter__(self) -> Any:
        self.follow.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.follow.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == _DEVICE:
            return self.places[args[0]] or DEVICE
        if func == _IS_CPU:
            return self.places[args[0]] == _CPU
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and self.places[args[0]] == DEVICE:
            raise TypeError(f"can't convert {DEVICE} tensor to numpy; use Tensor.cpu() first")
        if func in _MOVES:
            return self._moved(func, args, kwargs)
        if "device" in kwargs or func in self.constructors:
            return self._made(func, args, kwargs)
        if func is torch.Tensor.__deepcopy__:
            out, place = func(*args, **kwargs), self.places[args[0]]
            self.places[out] = place
            return out
        with self._making(_EITHER):
            return func(*args, **kwargs)

    def _moved(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensor, place, dtype = args[0], self.places[args[0]], args[0].dtype
        for value in (_CPU, *args[1:]) if func is torch.Tensor.cpu else (*args[1:], *kwargs.values()):
            if isinstance(value, Tensor):
                place, dtype = self.places[value], value.dtype
            elif isinstance(value, str | torch.device):
                place = _known(torch.device(value))
            elif isinstance(value, torch.dtype):
                dtype = value
        out = torch.Tensor.to(tensor, dtype, copy=bool(kwargs.get("copy")))
        if place != self.places[tensor]:
            return _Moved.apply(out, self.places, place)
        return out

    def _made(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asked = kwargs.get("device")
        like = [t for t in args if isinstance(t, Tensor)]
        place = _known(torch.device(asked)) if asked is not None else self.places[like[0]] if like else _CPU
        if place is not None and place.type not in (_CPU.type, DEVICE.type):
            return func(*args, **kwargs)  # meta
        if kwargs.get("generator") is not None and place == DEVICE:
            raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu'")
        if asked is not None:
            kwargs["device"] = _CPU
        with self._making(place):
            out = func(*args, **kwargs)
        if like and place != self.places[like[0]] and _storage(out) == _storage(like[0]):
            out = out.clone()
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.places[tensor] = place
        return out

    @contextmanager
    def _making(self, place: torch.device | None) -> Iterator[None]:
        before, self.follow.made = self.follow.made, place
        try:
            yield
        finally:
            self.follow.made = before


def _known(place: torch.device) -> torch.device:
    return DEVICE if place.type == DEVICE.type else place
