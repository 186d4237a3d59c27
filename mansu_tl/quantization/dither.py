"""The experiment behind the explanation: random updates on weights that rest at codes, anywhere, or half-way between.

Rounding erases an update that is smaller than a bin only if weights rest where it cannot reach a boundary. On weights
that lie anywhere in their bins it lets a share |d| / width of them through, each as a whole bin: the update arrives on
average, at every ratio of width to update, as sparse noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, orient, parameters
from mansu_tl.models.four_bit import require_dense
from mansu_tl.quantization.grid import Grid, grid_of
from mansu_tl.quantization.statistics import Cells, position_edges
from mansu_tl.results.result import Result, Table

SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
_NOISES = ("signs", "normal")


@dataclass(frozen=True)
class Dither(Result):
    """Random updates d beside their realised changes dQ = Q(w + d) - Q(w), over all quantized matrices of a model.

    Attributes:
        quantizer: the grid's name.
        noise: how updates were drawn: "signs" or "normal".
        seed: of the draws.
        weights: how many the matrices have.
        sizes: root mean square of the updates, in local bin widths.
        residence: how far the weights were moved to their codes' values first: 0 = where they lay, 1 = onto them.
        moved: weights that got an update.
        flips: those of them whose code changed.
        uniform: flips predicted for weights that lie anywhere in their bins: the sum of min(1, |d| / width).
        by_position: flips predicted from where each weight lies and from |d|, every direction that it may take being
            equally likely.
        inner: <dQ, d>.
        update_square: <d, d>.
        realised_square: <dQ, dQ>.
        position_edges: bin edges of resting positions, as in `UpdateStatistics`.
        position_counts: weights in each, before the updates.
    """

    quantizer: str
    noise: str
    seed: int
    weights: int
    sizes: Float64[Tensor, " size"]
    residence: Float64[Tensor, " residence"]
    moved: Int64[Tensor, "residence size"]
    flips: Int64[Tensor, "residence size"]
    uniform: Float64[Tensor, "residence size"]
    by_position: Float64[Tensor, "residence size"]
    inner: Float64[Tensor, "residence size"]
    update_square: Float64[Tensor, "residence size"]
    realised_square: Float64[Tensor, "residence size"]
    position_edges: Float64[Tensor, " position_edge"]
    position_counts: Int64[Tensor, "residence position_bin"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a residence and size.

        `flips`, `uniform` and `by_position` are shares of the moved weights; `overlap` is the share of all weights that
        keep their code; `cosine` of dQ and d (NaN where no code changed) is the fidelity; `projection` is
        <dQ, d> / <d, d>.
        """
        count = self.moved.double()
        columns = {
            "residence": self.residence[:, None].expand_as(count),
            "size": self.sizes.expand_as(count),
            "moved": self.moved,
            "flips": self.flips / count,
            "uniform": self.uniform / count,
            "by_position": self.by_position / count,
            "overlap": 1 - self.flips.double() / self.weights,
            "cosine": self.inner / (self.update_square * self.realised_square).sqrt(),
            "projection": self.inner / self.update_square,
        }
        frame = pd.DataFrame({key: value.flatten().numpy() for key, value in columns.items()})
        frame.insert(0, "quantizer", self.quantizer)
        return frame

    def __repr__(self) -> str:
        sizes = f"{float(self.sizes.min()):g} to {float(self.sizes.max()):g} bins"
        return (
            f"Dither({self.quantizer}: {self.noise} of {sizes} on {self.weights} weights, "
            f"residence {', '.join(f'{value:g}' for value in self.residence.tolist())})"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), rows=24),)


@torch_defaults()
@torch.no_grad()
def dither(
    model: TransformerBridge | PreTrainedModel,
    quantizer: str | Grid = "nf4",
    sizes: Sequence[float] = SIZES,
    residence: Sequence[float] = (0.0, 0.5, 1.0),
    *,
    noise: str = "signs",
    seed: int = 0,
    progress: bool = False,
) -> Dither:
    """Add random updates of given sizes to a model's matrices and measure what a quantizer lets through.

    For each residence s the weights are moved to w + s (Q(w) - w) first: 0 = as they are, 1 = onto their codes' values,
    where a model dequantized from 4 bits has them. Every scale is held, so that codes change for one reason only:
    weights that carry their block's absmax get no update, and one that would leave its block's range goes the other way
    (or stays, if it would leave it there too). The model is untouched; everything is computed in float32, since storage
    in 16 bits rounds small updates away by itself.

    Args:
        sizes: root mean square of the updates, in each weight's own bin width.
        noise: "signs" = every update has the size itself and a random sign; "normal" = normally distributed ones.
        seed: of the draws, which are the same for every residence and size.
        progress: show a bar over the matrices.

    Raises:
        MansuError: a quantizer without cells, no or wrong sizes, residence or noise, or packed weights.
    """
    grid = grid_of(quantizer).bound(model)
    _require(sizes, residence, noise)
    require_dense(model, "dither")
    live, linear = parameters(model), linear_weights(model)
    shape = (len(residence), len(sizes))
    totals: dict[str, Tensor] = {}
    edges = position_edges()
    positions = torch.zeros(len(residence), len(edges) - 1, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    for name, matrix in tqdm(linear.items(), desc="dither", unit="matrix", disable=not progress):
        w = orient(live[name].detach(), matrix).float().contiguous()
        unit = torch.randn(w.shape, generator=generator)
        unit = (unit if noise == "normal" else torch.where(unit < 0, -1.0, 1.0)).to(w.device)
        own = grid.of(name)
        target = own.roundtrip(w) - w
        for i, share in enumerate(residence):
            cells = _Shaken(own, w + share * target)
            positions[i] += cells.positions()
            for j, size in enumerate(sizes):
                for key, value in cells.shaken(unit, size).items():
                    kind = torch.int64 if isinstance(value, int) else torch.float64
                    totals.setdefault(key, torch.zeros(shape, dtype=kind))[i, j] += value
    return Dither(
        quantizer=grid.name,
        noise=noise,
        seed=seed,
        weights=sum(w.in_features * w.out_features for w in linear.values()),
        sizes=torch.tensor(sizes, dtype=torch.float64),
        residence=torch.tensor(residence, dtype=torch.float64),
        position_edges=edges,
        position_counts=positions,
        **totals,
    )


class _Shaken(Cells):
    """Weights in their cells, and what updates of them do."""

    def __init__(self, grid: Grid, w: Float[Tensor, "out in"]) -> None:
        super().__init__(grid, w)
        self.low, self.high = grid.ends(self.encoded.scales())
        # A block of zeros has no width, and all of its weights carry its absmax.
        self.free = ~grid.absmax_mask(w) & (self.upper > self.lower)

    def shaken(self, unit: Float[Tensor, "out in"], size: float) -> dict[str, int | float]:
        """What updates of `size` bins times `unit` do."""
        width = self.upper - self.lower
        step = size * width * unit.abs()
        may_rise, may_fall = self._inside(self.w + step), self._inside(self.w - step)
        up = torch.where(unit < 0, ~may_fall, may_rise)
        moved = self.free & (may_rise | may_fall) & (step > 0)
        w2 = torch.where(moved, self.w + torch.where(up, step, -step), self.w)
        codes = self.grid.codes(w2, self.encoded.absmax)
        flipped = codes != self.encoded.codes
        update = (w2.double() - self.w.double())[moved]
        realised = (self.grid.centre(codes, self.encoded.absmax) - self.centre).double()[moved]
        # The outermost boundaries are the block's ends, which no update passes.
        rises, falls = (self.w + step > self.upper) & may_rise, (self.w - step <= self.lower) & may_fall
        ways = (may_rise.int() + may_fall.int()).clamp(min=1)
        crossing = (rises.int() + falls.int()) / ways
        return {
            "moved": int(moved.sum()),
            "flips": int((flipped & moved).sum()),
            "uniform": float((step[moved] / width[moved]).clamp(max=1).double().sum()),
            "by_position": float(crossing[moved].double().sum()),
            "inner": float((realised * update).sum()),
            "update_square": float(update.square().sum()),
            "realised_square": float(realised.square().sum()),
        }

    def _inside(self, value: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """Whether a value moves no scale."""
        return (value > self.low) & (value < self.high)


def _require(sizes: Sequence[float], residence: Sequence[float], noise: str) -> None:
    if not sizes or not all(math.isfinite(size) and size > 0 for size in sizes):
        raise MansuError(f"dither: sizes={tuple(sizes)}; give some above 0, in bin widths")
    if not residence or not all(0 <= share <= 1 for share in residence):
        raise MansuError(
            f"dither: residence={tuple(residence)}; give some between 0 (as they are) and 1 (on the codes)"
        )
    if noise not in _NOISES:
        raise MansuError(f"dither: noise={noise!r}; choose one of {', '.join(_NOISES)}")
