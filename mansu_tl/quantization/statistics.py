"""What an update does to a quantizer's codes: how much of it the deployed model feels, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, orient, parameters
from mansu_tl.quantization.grid import Grid, grid_of
from mansu_tl.results.result import Result, Table

_LOWEST, _HIGHEST, _PER_DECADE = -8, 2, 10
_FINE = 10  # fine bins in each drawn one, for the median over all parameters
_POSITIONS = 41  # odd, so that a code's value lies in the middle of a bin
_POINTS = 64  # in each bin of update sizes, over which a prediction is averaged


@dataclass(frozen=True)
class UpdateStatistics(Result):
    """An update d = w' - w beside its realised change dQ = Q(w') - Q(w), matrix by matrix.

    Rounding is nearly unbiased on ordinary weights (it acts as dither: about |d| / width of the codes change, each by a
    whole bin) and erases sub-bin updates only on weights that rest at code centres; `position_counts` tells the two
    apart, `predicted` against `codes_changed` shows the result. What quantization leaves of unlearning is studied in
    QUAIL (arXiv 2601.15538) and MANSU (arXiv 2605.15138); these measures are our definitions.

    Attributes:
        quantizer: the grid's name.
        names: HF parameter names of the quantized matrices, one row each in the tensors below.
        weights: how many each has.
        changed: how many differ in value.
        codes_changed: how many of those changed have another code.
        untouched_codes_changed: how many unchanged weights have another code, because their block's absmax moved.
        blocks: how many blocks each has.
        absmax_changed: how many blocks' scales moved.
        predicted: codes that would change if weights lay anywhere in their bins with equal chance: sum of
            min(1, |d| / width).
        median_ratio: median over changed weights of width / |d|; NaN where nothing changed.
        total_median_ratio: the same over all matrices, read off a histogram: exact to 1.2 %.
        inner: <dQ, d>.
        update_square: <d, d>.
        realised_square: <dQ, dQ>.
        ratio_edges: bin edges of log10(|d| / local bin width); the outer bins hold everything beyond.
        ratio_counts: changed weights in each.
        ratio_flipped: those of them whose code changed.
        position_edges: bin edges of where weights rested inside their cells before the update: 0 = the lower boundary,
            .5 = the code's value, 1 = the upper boundary, linear between them. (The two outermost codes have no cell
            beyond their value.)
        position_counts: weights in each.
        width_sum: bin widths of the changed weights, added up; None = not kept.
        update_sum: |d| of the changed weights, added up; None = not kept.
    """

    quantizer: str
    names: tuple[str, ...]
    weights: Int64[Tensor, " matrix"]
    changed: Int64[Tensor, " matrix"]
    codes_changed: Int64[Tensor, " matrix"]
    untouched_codes_changed: Int64[Tensor, " matrix"]
    blocks: Int64[Tensor, " matrix"]
    absmax_changed: Int64[Tensor, " matrix"]
    predicted: Float64[Tensor, " matrix"]
    median_ratio: Float64[Tensor, " matrix"]
    total_median_ratio: float
    inner: Float64[Tensor, " matrix"]
    update_square: Float64[Tensor, " matrix"]
    realised_square: Float64[Tensor, " matrix"]
    ratio_edges: Float64[Tensor, " ratio_edge"]
    ratio_counts: Int64[Tensor, " ratio_bin"]
    ratio_flipped: Int64[Tensor, " ratio_bin"]
    position_edges: Float64[Tensor, " position_edge"]
    position_counts: Int64[Tensor, " position_bin"]
    width_sum: Float64[Tensor, " matrix"] | None = None
    update_sum: Float64[Tensor, " matrix"] | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """One row a matrix and a last row "total".

        Beside the attributes: `overlap`, the bucket overlap, which is the share of all weights whose code is the same
        before and after; `share` of the changed weights whose code changed; `predicted_share`; `mean_ratio`, the mean
        bin width over the mean |d| of the changed weights (the papers' "47 to 828 times"); `cosine` of dQ and d, the
        update's fidelity; and the `projection` <dQ, d> / <d, d> (1 = the update arrives in full on average). NaN where
        nothing changed.
        """
        sums = [
            "weights",
            "changed",
            "codes_changed",
            "untouched_codes_changed",
            "blocks",
            "absmax_changed",
            "predicted",
        ]
        frame = pd.DataFrame(
            {"parameter": [*self.names, "total"], **{key: _with_total(getattr(self, key)).numpy() for key in sums}}
        )
        changed = _with_total(self.changed).double()
        inner, update, realised = (_with_total(x) for x in (self.inner, self.update_square, self.realised_square))
        frame["overlap"] = 1 - (frame["codes_changed"] + frame["untouched_codes_changed"]) / frame["weights"]
        frame["share"] = (_with_total(self.codes_changed) / changed).numpy()
        frame["predicted_share"] = (_with_total(self.predicted) / changed).numpy()
        frame["median_ratio"] = [*self.median_ratio.tolist(), self.total_median_ratio]
        if self.width_sum is None or self.update_sum is None:
            frame["mean_ratio"] = float("nan")
        else:
            frame["mean_ratio"] = (_with_total(self.width_sum) / _with_total(self.update_sum)).numpy()
        frame["cosine"] = (inner / (update * realised).sqrt()).numpy()
        frame["projection"] = (inner / update).numpy()
        return frame

    def __repr__(self) -> str:
        total = self.to_dataframe().iloc[-1]
        return (
            f"UpdateStatistics({self.quantizer}: {int(total.changed)} of {int(total.weights)} weights changed, "
            f"{int(total.codes_changed)} of them their code, "
            f"cosine {total.cosine:.3g}, projection {total.projection:.3g})"
        )

    def _tables(self) -> Sequence[Table]:
        frame = self.to_dataframe()
        return (Table(pd.concat([frame.iloc[-1:], frame.iloc[:-1]]), "the total, then by matrix"),)


@torch_defaults()
def update_statistics(
    before: TransformerBridge | PreTrainedModel,
    after: TransformerBridge | PreTrainedModel,
    quantizer: str | Grid = "nf4",
) -> UpdateStatistics:
    """Measure an update against the bins of a quantizer, over every matrix that quantized loading quantizes.

    Raises:
        MansuError: an unknown quantizer, one without fixed cells, or two models of different shape.
    """
    grid = grid_of(quantizer).bound(before)
    linear, old, new = linear_weights(before), parameters(before), parameters(after)
    other = linear_weights(after)
    if linear != other:
        odd = sorted(name for name in {*linear, *other} if linear.get(name) != other.get(name))[0]
        raise MansuError(f"{odd}: differs in shape or is missing in one model; compare two models of the same config")
    fine = torch.zeros(2, (_HIGHEST - _LOWEST) * _PER_DECADE * _FINE, dtype=torch.int64)
    positions = torch.zeros(_POSITIONS, dtype=torch.int64)
    rows = []
    for name, shape in linear.items():
        w, w2 = orient(old[name].detach(), shape), orient(new[name].detach(), shape)
        rows.append(_measure(w, w2, grid.of(name), fine, positions))
    columns = {
        key: torch.tensor([row[key] for row in rows], dtype=torch.float64 if isinstance(value, float) else torch.int64)
        for key, value in rows[0].items()
    }
    coarse = fine.view(2, -1, _FINE).sum(2)
    return UpdateStatistics(
        quantizer=grid.name,
        names=tuple(linear),
        total_median_ratio=_median_ratio(fine[0]),
        ratio_edges=torch.linspace(_LOWEST, _HIGHEST, coarse.shape[1] + 1, dtype=torch.float64),
        ratio_counts=coarse[0],
        ratio_flipped=coarse[1],
        position_edges=position_edges(),
        position_counts=positions,
        **columns,
    )


def _measure(w: Tensor, w2: Tensor, grid: Grid, fine: Tensor, positions: Tensor) -> dict[str, int | float]:
    """One matrix's row; its histograms are added to `fine` and `positions`."""
    at, after = Cells(grid, w), grid.encode(w2)
    before, width = at.encoded, (at.upper - at.lower).double()
    positions += at.positions()
    changed = w != w2
    flipped = before.codes != after.codes
    realised = (grid.centre(after.codes, after.absmax) - at.centre).double()
    update = w2.double() - w.double()
    share = update.abs()[changed] / width[changed]
    place = ((share.log10() - _LOWEST) * _PER_DECADE * _FINE).floor().clamp(0, fine.shape[1] - 1).long().cpu()
    fine[0] += torch.bincount(place, minlength=fine.shape[1])
    fine[1] += torch.bincount(place[flipped[changed].cpu()], minlength=fine.shape[1])
    return {
        "weights": w.numel(),
        "changed": int(changed.sum()),
        "codes_changed": int((flipped & changed).sum()),
        "untouched_codes_changed": int((flipped & ~changed).sum()),
        "blocks": len(before.absmax),
        "absmax_changed": int((before.absmax != after.absmax).view(len(before.absmax), -1).any(1).sum()),
        "predicted": float(share.clamp(max=1).sum()),
        "median_ratio": float((1 / share).median()) if len(share) else torch.nan,
        "inner": float((realised * update).sum()),
        "update_square": float(update.square().sum()),
        "realised_square": float(realised.square().sum()),
        "width_sum": float(width[changed].sum()),
        "update_sum": float(update.abs()[changed].sum()),
    }


class Cells:
    """A matrix's weights in their cells: the ends of each weight's cell and its code's value."""

    def __init__(self, grid: Grid, w: Float[Tensor, "out in"]) -> None:
        self.grid, self.w, self.encoded = grid, w.float(), grid.encode(w)
        self.lower, self.upper = grid.cell(self.encoded.codes, self.encoded.absmax)
        self.centre = grid.centre(self.encoded.codes, self.encoded.absmax)

    def positions(self) -> Int64[Tensor, " position_bin"]:
        """How many weights rest where in their cells, as `UpdateStatistics.position_counts`."""
        side = torch.where(self.w < self.centre, self.centre - self.lower, self.upper - self.centre)
        # An outermost code ends at its value, and a block of zeros is all value: nothing lies beyond, so 0 there.
        offset = torch.where(side > 0, (self.w - self.centre) / side, 0.0)
        place = ((0.5 + offset / 2) * _POSITIONS).floor().clamp(0, _POSITIONS - 1).long()
        return torch.bincount(place.reshape(-1), minlength=_POSITIONS).cpu()


def position_edges() -> Float64[Tensor, " position_edge"]:
    """The bin edges of `Cells.positions`: 0 = the lower boundary, .5 = the code's value, 1 = the upper boundary."""
    return torch.linspace(0, 1, _POSITIONS + 1, dtype=torch.float64)


def _median_ratio(counts: Tensor) -> float:
    """Median width / |d| from the fine histogram of log10(|d| / width): the middle of the bin that holds it."""
    total = int(counts.sum())
    if not total:
        return float("nan")
    place = int((counts.cumsum(0) >= (total + 1) // 2).nonzero()[0])
    return float(10 ** -(_LOWEST + (place + 0.5) / (_PER_DECADE * _FINE)))


def _with_total(column: Tensor) -> Tensor:
    return torch.cat([column, column.sum(0, keepdim=True)])


@torch_defaults()
def predicted_flips(statistics: UpdateStatistics) -> pd.DataFrame:
    """How many codes should change, in bins of |d| / width and in all, beside how many do.

    A weight at a distance t of a boundary (in bin widths) crosses it when |d| reaches t in its direction. With up and
    down equally likely, a share S(r) = (P(t_below < r) + P(t_above < r)) / 2 of the weights that move by r bins take
    another code. Weights anywhere in their bins: S(r) = min(1, r), whatever the ratio of width to update. Weights at
    their codes' values: nothing up to about half a bin, everything from there on. `by_position` reads S off the
    histogram of resting positions of the whole model: it takes updates to be independent of them, and every code to lie
    in the middle of its cell (`dither` needs neither). Our definition.

    Returns:
        One row a bin of update sizes that holds any weight, and a last row for all: `low`, `high` (|d| / width),
        `changed` (weights), and shares of them: `measured`, `uniform` and `by_position`.

    Raises:
        MansuError: the update changed no weight.
    """
    counts = statistics.ratio_counts.double()
    if not counts.sum():
        raise MansuError("update: it changed no weight, so no code can be predicted; compare two different models")
    edges = statistics.ratio_edges
    steps = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    sizes = 10 ** (edges[:-1, None] + edges.diff()[:, None] * steps)
    uniform = sizes.clamp(max=1).mean(1)
    by_position = crossing_share(sizes, statistics.position_edges, statistics.position_counts).mean(1)
    some = counts.nonzero()[:, 0]
    columns = {
        "low": 10 ** edges[:-1][some],
        "high": 10 ** edges[1:][some],
        "changed": statistics.ratio_counts[some],
        "measured": statistics.ratio_flipped[some] / counts[some],
        "uniform": uniform[some],
        "by_position": by_position[some],
    }
    frame = pd.DataFrame({key: value.numpy() for key, value in columns.items()})
    weight = frame["changed"] / frame["changed"].sum()
    total = {key: float((frame[key] * weight).sum()) for key in ("measured", "uniform", "by_position")}
    ends = {"low": frame["low"].min(), "high": frame["high"].max(), "changed": frame["changed"].sum()}
    return pd.concat([frame, pd.DataFrame([{**ends, **total}])], ignore_index=True)


def crossing_share(
    sizes: Float64[Tensor, "*any"], position_edges: Float64[Tensor, " position_edge"], position_counts: Tensor
) -> Float64[Tensor, "*any"]:
    """S(r) of `predicted_flips` for moves of r bins, from a histogram of resting positions (0 and 1 = the boundaries)."""
    share = position_counts.double() / position_counts.sum()
    low, width = position_edges[:-1], position_edges.diff()
    r = sizes[..., None]
    # Weights lie anywhere in their bin of the histogram.
    below = ((r - low) / width).clamp(0, 1)
    above = ((r - (1 - low - width)) / width).clamp(0, 1)
    return ((below + above) / 2 * share).sum(-1)
