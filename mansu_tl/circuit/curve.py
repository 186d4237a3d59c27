"""Faithfulness against circuit size, with a random control: how few edges a method's scores need.

CPR and CMD are those of MIB (Mueller et al. 2025, arXiv 2504.13151): with f(k) the faithfulness of the circuit of the
k-th part of all edges, for k in .001, .002, .005, .01, .02, .05, .1, .2, .5, 1,

    CPR = area under f (higher is better), CMD = area between f and 1, of |1 - f| (lower is better).

Their public code adds trapezoids between neighbouring k over the linear axis of shares asked for (before pruning) and
rounds k times the number of edges down; so does this. The area begins at the smallest k, not at 0: a perfect method
has CPR .999 over the ten shares above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.evaluation import relative
from mansu_tl.circuit.graph import Graph
from mansu_tl.circuit.scores import EdgeScores
from mansu_tl.circuit.selection import pruned_masks, random_mask
from mansu_tl.data import PromptPairs
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.results.result import Result, Table
from mansu_tl.results.serialise import MismatchError
from mansu_tl.runs.ablation import Ablation
from mansu_tl.runs.metrics import Metric, logit_difference, metric_name

MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class FaithfulnessCurve(Result):
    """Faithfulness of the circuits of growing size that a method's scores give.

    Attributes:
        faithfulness: of each size.
        control: of as many random edges, one row a seed (rows 0..seeds-1); no rows without a control.
        sizes: edges selected, ascending.
        shares: what share of all edges each size stands for, the x axis of the areas.
        edges: edges left of each size after pruning.
        n_edges: all edges of the graph.
        method: what scored the edges, and how they were selected.
        metric: name of the metric.
        ablation: what edges outside the circuit carry.
    """

    faithfulness: Float[Tensor, " size"]
    control: Float[Tensor, "seed size"]
    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    edges: tuple[int, ...]
    n_edges: int
    method: str
    metric: str
    ablation: str

    @property
    def cpr(self) -> float:
        """Area under the curve over the shares (MIB's CPR where the shares are MIB's)."""
        return self._area(self.faithfulness)

    @property
    def cmd(self) -> float:
        """Area between the curve and 1 over the shares (MIB's CMD where the shares are MIB's)."""
        return self._area((1 - self.faithfulness).abs())

    @property
    def cmd_signed(self) -> float:
        """Area between the curve and 1 with its sign: what circuits that do more than the model add is taken off."""
        return self._area(1 - self.faithfulness)

    def edges_to_reach(self, target: float = 0.85) -> int | None:
        """The smallest of the sizes whose faithfulness is at least `target`; None if none is."""
        return _first(self.sizes, self.faithfulness, target)

    def control_to_reach(self, target: float = 0.85) -> list[int | None]:
        """The same for every random control."""
        return [_first(self.sizes, row, target) for row in self.control]

    @torch_defaults()
    def control_interval(self, level: float = 0.95) -> tuple[Float[Tensor, " size"], Float[Tensor, " size"]]:
        """Quantiles over the random seeds that hold `level` of them, at every size.

        Raises:
            MansuError: there is no control, or a level outside (0, 1].
        """
        if not 0 < level <= 1:
            raise MansuError(f"curve: level={level}; choose a share in (0, 1], such as 0.95")
        if len(self.control) == 0:
            raise MansuError("curve: it has no random control; measure it with control_seeds=5")
        low, high = torch.quantile(self.control, torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=0)
        return low, high

    def to_dataframe(self) -> pd.DataFrame:
        """One row a size; the control's mean, least and most where there is one."""
        frame = pd.DataFrame(
            {
                "size": self.sizes,
                "share": self.shares,
                "edges": self.edges,
                "faithfulness": self.faithfulness.tolist(),
            }
        )
        if len(self.control):
            frame["random_mean"] = self.control.mean(0).tolist()
            frame["random_min"], frame["random_max"] = self.control.amin(0).tolist(), self.control.amax(0).tolist()
        return frame

    @torch_defaults()
    def _area(self, height: Tensor) -> float:
        return torch.trapezoid(height.double(), torch.tensor(self.shares, dtype=torch.float64)).item()

    def _check(self) -> None:
        counts = {len(self.sizes), len(self.shares), len(self.edges), len(self.faithfulness)}
        if len(counts) > 1:
            raise MismatchError("its sizes, shares, edges and values differ in number")

    def __repr__(self) -> str:
        return (
            f"FaithfulnessCurve({self.method}, {self.metric}, {self.ablation} ablation: CPR {self.cpr:.3f}, CMD "
            f"{self.cmd:.3f}, {self.edges_to_reach()} of {self.n_edges} edges for 0.85)"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), form="{:.3f}".format, rows=24),)


@torch_defaults()
def faithfulness_curve(
    model: TransformerBridge,
    scores: EdgeScores,
    pairs: PromptPairs,
    sizes: Sequence[int | float] | None = None,
    *,
    select: str = "top",
    by: str = "absolute",
    control_seeds: int = 0,
    ablation: Ablation | None = None,
    metric: Metric = logit_difference,
    batch_size: int = 64,
    progress: bool = False,
) -> FaithfulnessCurve:
    """Measure the circuits that scores give at several sizes, by exact edge patching of all of them together.

    Args:
        sizes: numbers of edges, or shares of all edges as floats in (0, 1]; MIB's ten shares where not given.
        select: "top" takes the best edges and prunes, "greedy" grows the circuit from the logits and prunes.
        by: rank edges by "absolute" or "signed" score.
        control_seeds: how many random circuits of every size are measured beside them (drawn with seeds 0, 1, ...).

    Raises:
        MansuError: scores of another architecture, sizes that are out of range or missing, an unknown selection, or
            pairs on which the model shows no difference.
    """
    graph = Graph.of(model)
    if not scores.same_graph(graph):
        raise MansuError("edge scores: their writers and readers are not this model's; score the edges of this model")
    if control_seeds < 0:
        raise MansuError(f"curve: control_seeds={control_seeds}; give a number from 0 up")
    total = graph.n_edges
    asked = _asked(MIB_SHARES if sizes is None else sizes, total)
    counts = list(asked)
    chosen = pruned_masks(scores, counts, select, by)
    drawn = [random_mask(graph.exists, n, seed) for seed in range(control_seeds) for n in counts]
    values = torch.tensor(
        relative(model, torch.stack([*chosen, *drawn]).float(), pairs, ablation, metric, batch_size, progress)
    )
    order = "" if by == "absolute" else ", signed"
    return FaithfulnessCurve(
        faithfulness=values[: len(counts)],
        control=values[len(counts) :].view(control_seeds, len(counts)),
        sizes=tuple(counts),
        shares=tuple(asked.values()),
        edges=tuple(int(mask.sum()) for mask in chosen),
        n_edges=total,
        method=f"{scores.method} {scores.rule} x{scores.steps}, {select}{order}",
        metric=metric_name(metric),
        ablation=ablation.kind if ablation else "corrupt",
    )


def _asked(sizes: Sequence[int | float], total: int) -> dict[int, float]:
    """Numbers of edges and the shares that they stand for; two shares of one number keep the larger."""
    out: dict[int, float] = {}
    for size in sizes:
        share = size if isinstance(size, float) else size / total
        if not 0 <= share <= 1 or (isinstance(size, float) and size == 0):
            raise MansuError(f"curve: size {size}; give numbers of edges in 0..{total}, or shares as floats in (0, 1]")
        out[int(size * total) if isinstance(size, float) else int(size)] = float(share)
    if not out:
        raise MansuError("curve: no sizes given; give at least one, or leave them out for MIB's")
    return dict(sorted(out.items()))


def _first(sizes: Sequence[int], values: Tensor, target: float) -> int | None:
    return next((size for size, value in zip(sizes, values.tolist(), strict=True) if value >= target), None)
