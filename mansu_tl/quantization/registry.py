"""Quantizers by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import MappingProxyType

from mansu_tl.errors import MansuError
from mansu_tl.quantization.awq import awq
from mansu_tl.quantization.base import CalibratedQuantizer, Quantizer
from mansu_tl.quantization.double import doubled
from mansu_tl.quantization.fp4 import fp4
from mansu_tl.quantization.gptq import gptq
from mansu_tl.quantization.grid import Grid
from mansu_tl.quantization.hqq_adapter import hqq
from mansu_tl.quantization.int3 import int3
from mansu_tl.quantization.int4 import int4, int4_asymmetric
from mansu_tl.quantization.int8 import int8
from mansu_tl.quantization.nf4 import nf4
from mansu_tl.quantization.torchao_adapter import torchao

_GRIDS: MappingProxyType[str, Callable[[], Grid]] = MappingProxyType(
    {
        "nf4": nf4,
        "nf4-128": lambda: nf4(128),
        "nf4-dq": lambda: doubled(nf4()),
        "nf4-128-dq": lambda: doubled(nf4(128)),
        "fp4": fp4,
        "int8": int8,
        "int4-g64": int4,
        "int4-g128": lambda: int4(128),
        "int4-asym-g64": int4_asymmetric,
        "int4-asym-g128": lambda: int4_asymmetric(128),
        "int3-g64": int3,
    }
)
_CALIBRATED: MappingProxyType[str, Callable[[], CalibratedQuantizer]] = MappingProxyType(
    {
        "gptq-int4-g64": gptq,
        "gptq-int4-g128": lambda: gptq(int4(128)),
        "awq-int4-g64": awq,
        "awq-int4-g128": lambda: awq(int4(128)),
        # The zero point and the groups of 128 are the published AWQ models' own.
        "awq-int4-asym-g128": lambda: awq(int4_asymmetric(128)),
    }
)
# Name -> the package that computes it (also the name of this package's extra) and what makes it.
_LIBRARY: MappingProxyType[str, tuple[str, Callable[[], Quantizer]]] = MappingProxyType(
    {
        "hqq-int4-g64": ("hqq", hqq),
        "torchao-int4-g64": ("torchao", torchao),
        "torchao-int8": ("torchao", lambda: torchao(8, None)),
    }
)
_KINDS = ("grid", "calibrated", "library")


def quantizers(kind: str | None = None) -> tuple[str, ...]:
    """The names that `quantizer` knows.

    Args:
        kind: "grid" = those with fixed cells, which the floor and `update_statistics` can work with; "calibrated" =
            those that need calibration text; "library" = those computed by a package that is optional, as far as it
            is installed; None = all three.

    Raises:
        MansuError: another kind.

    Example:
        >>> "nf4" in mtl.quantizers()
        True
    """
    if kind is not None and kind not in _KINDS:
        raise MansuError(f"quantizers: unknown kind {kind!r}; choose one of {', '.join(_KINDS)}")
    installed = tuple(name for name, (package, _) in _LIBRARY.items() if _installed(package))
    parts = {"grid": tuple(_GRIDS), "calibrated": tuple(_CALIBRATED), "library": installed}
    return tuple(name for key in _KINDS if kind in (None, key) for name in parts[key])


def quantizer(name: str | Quantizer | CalibratedQuantizer) -> Quantizer | CalibratedQuantizer:
    """The quantizer of that name: a `Grid`, or one without cells; one of your own is handed back as it is.

    Raises:
        MansuError: a name that is not in `quantizers()`, or one whose package is not installed.
    """
    if isinstance(name, Quantizer | CalibratedQuantizer):
        return name
    if name in _GRIDS:
        return _GRIDS[name]()
    if name in _CALIBRATED:
        return _CALIBRATED[name]()
    if name in _LIBRARY:
        package, make = _LIBRARY[name]
        if not _installed(package):
            raise MansuError(f"quantizer {name!r}: {package} is not installed; pip install 'mansu-tl[{package}]'")
        return make()
    raise MansuError(f"quantizer {name!r}: unknown; choose one of {', '.join(quantizers())}")


def grid_of(name: str | Quantizer | CalibratedQuantizer) -> Grid:
    """The quantizer of that name where it has fixed cells, which floors and update statistics need.

    Raises:
        MansuError: as `quantizer`, or a quantizer without cells.
    """
    found = quantizer(name)
    if not isinstance(found, Grid):
        raise MansuError(
            f"quantizer {found.name!r}: a weight's code there depends on other weights, so it has no cells to count or "
            f"cross; choose one of {', '.join(_GRIDS)}"
        )
    return found


def _installed(package: str) -> bool:
    return find_spec(package) is not None
