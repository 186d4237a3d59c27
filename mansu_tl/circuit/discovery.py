"""Choosing a circuit: the smallest set of top-scored edges that still does the job."""

from __future__ import annotations

from numbers import Real

import torch
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.attribution import edge_attribution
from mansu_tl.circuit.circuit import Circuit
from mansu_tl.circuit.evaluation import Judge
from mansu_tl.circuit.scores import EdgeScores
from mansu_tl.circuit.selection import pruned_masks
from mansu_tl.data import PromptPairs
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.results.result import bars
from mansu_tl.runs.ablation import Ablation
from mansu_tl.runs.metrics import Metric, logit_difference

# Sizes tried side by side in each round of the search.
_GRID = 16


@torch_defaults()
def discover_circuit(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    faithfulness: float = 0.85,
    scores: EdgeScores | None = None,
    steps: int = 5,
    select: str = "top",
    by: str = "absolute",
    ablation: Ablation | None = None,
    metric: Metric = logit_difference,
    batch_size: int = 64,
    progress: bool | None = None,
) -> Circuit:
    """The smallest top-n circuit by |EAP-IG score| whose edge-patched faithfulness reaches a target.

    The size is found on a geometric grid of 16 sizes, then by refining the interval in which the target is first
    reached until neighbouring sizes are tried; sizes that the grid passes over below that interval are not tried. Sizes of
    a grid are measured from the smallest up, and none past the first that reaches the target.

    Args:
        faithfulness: the target share of the clean-corrupt difference, in (0, 1].
        scores: edge scores to select by; computed with EAP-IG and `steps` where not given.
        select: "top" takes the strongest edges, "greedy" grows the circuit from the logits.
        by: "absolute" ranks by |score|, "signed" takes what supports the answer first and what hinders it last.
        ablation: what edges outside the circuit carry; their values on the corrupt prompts where not given.
        progress: show progress bars; None = in notebooks.

    Raises:
        MansuError: a target outside (0, 1], an unknown selection, pairs on which the model shows no difference, or a
            target that even the full graph misses.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> circuit = mtl.discover_circuit(model, task.forget_pairs[:16], faithfulness=0.8)
        >>> circuit.faithfulness >= 0.8
        True
    """
    if not isinstance(faithfulness, Real) or not 0 < faithfulness <= 1:
        raise MansuError(f"circuit: faithfulness={faithfulness!r}; choose a target in (0, 1]")
    if scores is None:
        scores = edge_attribution(
            model, pairs, steps=steps, metric=metric, batch_size=batch_size, progress=bars(progress)
        )
    total = int(scores.exists.sum())
    grid = sorted({round(total ** (i / (_GRID - 1))) for i in range(_GRID)})
    judge = Judge(model, pairs, ablation, metric, batch_size)
    below = at = 0
    value = float("nan")
    while not at or at - below > 1:
        masks = torch.stack(pruned_masks(scores, grid, select, by)).float()
        values = judge.until(masks, faithfulness, bars(progress))
        first = next((i for i, v in enumerate(values) if v >= faithfulness), len(grid))
        if first < len(grid):
            at, value = grid[first], values[first]
        elif not at:
            raise MansuError(
                f"circuit: no top-n circuit reaches faithfulness {faithfulness}; the best of sizes {grid} has "
                f"{max(values):.3f}; lower the target or use another metric"
            )
        below = [below, *grid][first]
        width = at - below
        # The last of the sizes is `at`, which is known to reach the target.
        grid = sorted({below + max(1, round(width * i / _GRID)) for i in range(1, _GRID)} - {at})
    return (Circuit.top if select == "top" else Circuit.greedy)(scores, at, value, by=by)
