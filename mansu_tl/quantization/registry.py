"""Quantizers by name."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from mansu_tl.errors import MansuError
from mansu_tl.quantization.fp4 import fp4
from mansu_tl.quantization.grid import Grid
from mansu_tl.quantization.int4 import int4
from mansu_tl.quantization.int8 import int8
from mansu_tl.quantization.nf4 import nf4

_QUANTIZERS: MappingProxyType[str, Callable[[], Grid]] = MappingProxyType(
    {
        "nf4": nf4,
        "nf4-128": lambda: nf4(128),
        "fp4": fp4,
        "int8": int8,
        "int4-g64": int4,
        "int4-g128": lambda: int4(128),
    }
)


def quantizers() -> tuple[str, ...]:
    """The names that `quantizer` knows."""
    return tuple(_QUANTIZERS)


def quantizer(name: str | Grid) -> Grid:
    """The grid of that name; a `Grid` of your own is handed back as it is.

    Raises:
        MansuError: a name that is not in `quantizers()`.
    """
    if isinstance(name, Grid):
        return name
    if name not in _QUANTIZERS:
        raise MansuError(f"quantizer {name!r}: unknown; choose one of {', '.join(_QUANTIZERS)}")
    return _QUANTIZERS[name]()
