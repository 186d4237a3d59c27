"""Why codes change: predicted from how large an update is in bins, and from where the weights rest inside them."""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.quantization.statistics import UpdateStatistics

_POINTS = 64  # in each bin of update sizes, over which a prediction is averaged


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
    sizes: Float64[Tensor, "*any"],
    position_edges: Float64[Tensor, " position_edge"],
    position_counts: Tensor,
) -> Float64[Tensor, "*any"]:
    """S(r) of `predicted_flips` for moves of r bins, from a histogram of resting positions (0 and 1 = the boundaries)."""
    share = position_counts.double() / position_counts.sum()
    low, width = position_edges[:-1], position_edges.diff()
    r = sizes[..., None]
    # Weights lie anywhere in their bin of the histogram.
    below = ((r - low) / width).clamp(0, 1)
    above = ((r - (1 - low - width)) / width).clamp(0, 1)
    return ((below + above) / 2 * share).sum(-1)
