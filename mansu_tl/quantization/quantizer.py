"""What a quantizer is, something that says which matrix a quantized deployment computes with; and all of them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TypeVar

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, orient
from mansu_tl.models.tree import Model
from mansu_tl.registry import Registry

Q = TypeVar("Q", bound="Quantizer")


@dataclass(frozen=True)
class Inputs:
    """What a calibration text shows to one matrix, over its real tokens.

    Attributes:
        moment: E[x x^T] of the matrix's inputs x; an error dW moves its outputs by E |dW x|^2 = tr(dW moment dW^T).
        magnitude: E |x_j| of each input feature.
        tokens: how many real tokens the means are over.
    """

    moment: Float[Tensor, "in in"]
    magnitude: Float[Tensor, " in"]
    tokens: int

    def error(self, change: Float[Tensor, "out in"]) -> Float[Tensor, ""]:
        """Mean squared change of the matrix's outputs on the calibration text, E |dW x|^2, summed over outputs."""
        d = change.to(self.moment.dtype)
        return ((d @ self.moment) * d).sum()


class Quantizer(ABC):
    """One that needs nothing but the matrix."""

    name: str

    @abstractmethod
    def roundtrip(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Q(w): what the deployed model uses in place of `w`, in the dtype of `w`."""

    def first_rows(self, w: Float[Tensor, "out in"], rows: int) -> Float[Tensor, "rows in"]:
        """Q(w) of a matrix's first rows."""
        return self.roundtrip(w[:rows].contiguous())

    def bound(self: Q, model: Model) -> Q:
        """Itself; for a quantizer that belongs to the file a model came from, the one of this model's file."""
        return self

    def quantized(self, model: Model, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Q(w) of every matrix that it quantizes, given a model's values by HF parameter name, as the model stores them."""
        return {
            name: orient(self.roundtrip(orient(live[name].detach(), linear)), linear).contiguous()
            for name, linear in linear_weights(model).items()
        }


class CalibratedQuantizer(ABC):
    """One that looks at the inputs which a calibration text sends through the matrix.

    Its codes depend on whole rows and on the text, so it has no cells that a floor could move a weight across.

    Attributes:
        sequential: whether a layer's inputs are taken behind the layers that are quantized already.
    """

    name: str
    sequential: bool

    @abstractmethod
    def roundtrip(self, w: Float[Tensor, "out in"], inputs: Inputs) -> Float[Tensor, "out in"]:
        """Q(w): what the deployed model uses in place of `w`, in the dtype of `w`."""


AnyQuantizer = Quantizer | CalibratedQuantizer


@dataclass(frozen=True)
class About:
    """What a quantizer stores, and who ships it: a row of tables.

    Attributes:
        bits: of one code.
        block: how many weights share a scale; "row" or "matrix".
        scale: how scales are kept.
        used_by: who writes or serves it.
    """

    bits: str = ""
    block: str = ""
    scale: str = ""
    used_by: str = ""


@dataclass(frozen=True)
class _Entry:
    make: Callable[[], AnyQuantizer]
    kind: str
    package: str
    about: About


_KINDS = ("grid", "calibrated", "library", "searched", "file")
_QUANTIZERS = Registry[_Entry]("quantizer")


def register_quantizer(
    name: str,
    make: Callable[[], AnyQuantizer],
    kind: str = "library",
    *,
    package: str = "",
    about: About | None = None,
) -> None:
    """Make a quantizer known by name to everything that takes one.

    Args:
        make: gives it; its `name` is this one.
        kind: "grid" = a `Grid`, "calibrated" = a `CalibratedQuantizer`, "file" = one that belongs to the file that a model
            came from, "searched" = one whose scales are searched, "library" = any other.
        package: what has to be installed for it; also the name of this package's extra.
        about: what it stores, for tables.

    Raises:
        MansuError: a name that is taken, or another kind.
    """
    _require_kind(kind)
    _QUANTIZERS.add(name, _Entry(make, kind, package, about or About()))


def quantizers(kind: str | None = None) -> tuple[str, ...]:
    """The names that `quantizer` knows.

    Args:
        kind: "grid" = those with fixed cells, which the floor and `update_statistics` can work with; "calibrated" =
            those that need calibration text; "library" = those computed by a package that is optional, as far as it
            is installed; "searched" = those whose scales are searched over all weights of a block, so that a code has
            no cell of its own; "file" = the file that a model came from; None = all kinds but the last, which take
            any model.

    Raises:
        MansuError: another kind.

    Example:
        >>> "nf4" in mtl.quantization.quantizers()
        True
    """
    if kind is None:
        return tuple(name for each in _KINDS if each != "file" for name in quantizers(each))
    _require_kind(kind)
    return tuple(name for name, entry in _QUANTIZERS.items() if entry.kind == kind and _installed(entry.package))


def quantizer_table() -> pd.DataFrame:
    """What there is to choose from: one row a quantizer, those of packages that are not installed too.

    Returns:
        `quantizer`, `bits`, `block` (weights that share a scale), `scale` (how it is kept), `used_by`, `kind` (as
        `quantizers`) and `package` (what it needs; "" = nothing).

    Example:
        >>> mtl.quantization.quantizer_table().set_index("quantizer").loc["nf4", "block"]
        '64'
    """
    rows = [
        {"quantizer": name, **asdict(entry.about), "kind": entry.kind, "package": entry.package}
        for kind in _KINDS
        for name, entry in _QUANTIZERS.items()
        if entry.kind == kind
    ]
    return pd.DataFrame(rows)


def quantizer(name: str | AnyQuantizer) -> AnyQuantizer:
    """The quantizer of that name: a `Grid`, or one without cells; one of your own is handed back as it is.

    Raises:
        MansuError: a name that is not in `quantizers()`, or one whose package is not installed.
    """
    if isinstance(name, AnyQuantizer):
        return name
    entry = _QUANTIZERS[name]
    if not _installed(entry.package):
        raise MansuError(
            f"quantizer {name!r}: {entry.package} is not installed; pip install 'mansu-tl[{entry.package}]'"
        )
    return entry.make()


def _require_kind(kind: str) -> None:
    if kind not in _KINDS:
        raise MansuError(f"quantizers: unknown kind {kind!r}; choose one of {', '.join(_KINDS)}")


def _installed(package: str) -> bool:
    return not package or find_spec(package) is not None
