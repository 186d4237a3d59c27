"""Which grid a checkpoint rests on: whether its weights are what some quantizer's codes stand for.

A checkpoint that was dequantized, or trained with quantization in mind and stored in full precision, rests on the grid it
came from: rounding to that grid changes nothing, so that an update smaller than half a bin comes back whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, orient, parameters
from mansu_tl.models.four_bit import require_dense
from mansu_tl.models.gguf import gguf_weights
from mansu_tl.models.stored import stored_formats
from mansu_tl.quantization.formats.gguf_k import SearchedQuantizer
from mansu_tl.quantization.quantizer import Quantizer, quantizer, quantizers
from mansu_tl.results.result import Result, Table

# Weights of each matrix that are looked at; whole rows from the top.
_ROWS_OF = 2**17
# Those that are looked at first: no more where fewer than half of them lie on the grid.
_SAMPLE = 2**11
# A grid that a matrix rests on gives back every weight; one that it does not, only those that carry a block's scale.
_RESTS = 0.999


@dataclass(frozen=True)
class RestingGrid(Result):
    """How many of a model's weights lie exactly on a code of each grid.

    Attributes:
        quantizers: the grids.
        shares: for each, the share of the looked-at weights that it gives back bit for bit; of a matrix of whose first
            2,048 weights a grid gives back less than half, those alone count.
        matrices: for each, the share of matrices that it gives back whole.
        weights: how many weights were looked at, at most.
        file: the GGUF file, or the folder of codes, that the model came from; "" for a dense one.
        types: number formats of the matrices there, and how many weights each holds.
    """

    quantizers: tuple[str, ...]
    shares: tuple[float, ...]
    matrices: tuple[float, ...]
    weights: int
    file: str
    types: Mapping[str, int]

    @property
    def best(self) -> str:
        """The grid that the model rests on; "" where none gives back 99.9 % of its weights."""
        share, name = max(zip(self.shares, self.quantizers, strict=True))
        return name if share >= _RESTS else ""

    def to_dataframe(self) -> pd.DataFrame:
        """One row a grid, the best first: `quantizer`, `share` of weights, `matrices` (share)."""
        columns = {"quantizer": self.quantizers, "share": self.shares, "matrices": self.matrices}
        return pd.DataFrame(columns).sort_values("share", ascending=False, ignore_index=True)

    def __repr__(self) -> str:
        came = f"came from {self.file} ({', '.join(self.types)}), " if self.file else ""
        return f"RestingGrid({came}rests on {self.best or 'no known grid'}, {self.weights:,} weights looked at)"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "share of weights that lie on a code"),)


@torch_defaults()
def find_grid(
    model: TransformerBridge | PreTrainedModel, names: Sequence[str] | None = None, rows_of: int = _ROWS_OF
) -> RestingGrid:
    """Round every matrix to every known grid and count the weights that stay as they are, bit for bit.

    What a model rests on decides which updates will come back when it is quantized again. Our own.

    Args:
        names: the grids; where nothing is given `quantizers("grid")` and GGUF's formats of searched scales, which are
            looked for in rows of multiples of 256 (llama.cpp finds the scales of about 99.9 % of real weights again).
        rows_of: look at no more weights of a matrix than these, whole rows from the top; 0 = all.

    Raises:
        MansuError: a quantizer that is no grid of its own, no grid at all, or a model with 4-bit layers.

    Example:
        >>> mtl.find_grid(mtl.quantize(mtl.load("pocket"), "nf4"), ["nf4", "int8"]).best
        'nf4'
    """
    searched = (name for name in quantizers("searched") if isinstance(quantizer(name), SearchedQuantizer))
    known = (*quantizers("grid"), *searched)
    chosen = known if names is None else tuple(names)
    if not chosen or not set(chosen) <= set(known):
        raise MansuError(f"grids: {', '.join(chosen) or 'none'}; choose from {', '.join(known)}")
    require_dense(model, "finding its grid")
    live, linear, weights, stored = parameters(model), linear_weights(model), gguf_weights(model), stored_formats(model)
    kept, looked, whole = torch.zeros(3, len(chosen), dtype=torch.long)
    total = 0
    for name, shape in linear.items():
        matrix = orient(live[name].detach(), shape)
        columns = matrix.shape[1]
        rows = min(len(matrix), max(1, rows_of // columns)) if rows_of else len(matrix)
        total += rows * columns
        for i, grid in enumerate(chosen):
            few = min(rows, max(1, _SAMPLE // columns))
            same, of = _kept(matrix, few, grid), few * columns
            if few < rows and 2 * same >= of:
                same, of = _kept(matrix, rows, grid), rows * columns
            kept[i] += same
            looked[i] += of
            whole[i] += same == rows * columns
    types: dict[str, int] = {}
    if weights is not None:
        for name in linear:
            types[weights.types[name]] = types.get(weights.types[name], 0) + live[name].numel()
    if stored is not None:
        for name in linear:
            kind = stored.formats.get(name, "dense")
            types[kind] = types.get(kind, 0) + live[name].numel()
    return RestingGrid(
        quantizers=chosen,
        shares=tuple((kept / looked).tolist()),
        matrices=tuple((whole / len(linear)).tolist()),
        weights=total,
        file=str(weights.file.path) if weights is not None else stored.folder if stored is not None else "",
        types=types,
    )


def _kept(matrix: Tensor, rows: int, name: str) -> int:
    """How many weights of the first rows a grid gives back; none where its blocks do not fit them."""
    grid = quantizer(name)
    assert isinstance(grid, Quantizer)
    if isinstance(grid, SearchedQuantizer) and not grid.fits(matrix.shape[1]):
        return 0
    try:
        return int((grid.first_rows(matrix, rows) == matrix[:rows]).sum())
    except MansuError:
        return 0
