"""Choosing a circuit: the smallest set of top-scored edges that still does the job."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.attribution import edge_attribution
from mansu_tl.circuit.circuit import Circuit, kv_groups, random_mask, top_mask
from mansu_tl.circuit.graph import Graph, prune
from mansu_tl.circuit.intervention import patch_edges
from mansu_tl.circuit.scores import EdgeScores
from mansu_tl.data import PromptPairs
from mansu_tl.errors import MansuError
from mansu_tl.metrics import Metric, logit_difference
from mansu_tl.models import fingerprint
from mansu_tl.patching.runs import chunks, measured, run

# Sizes tried side by side in each round of the search.
_GRID = 16


def discover_circuit(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    faithfulness: float = 0.85,
    scores: EdgeScores | None = None,
    steps: int = 5,
    metric: Metric = logit_difference,
    batch_size: int = 64,
    progress: bool = False,
) -> Circuit:
    """The smallest top-n circuit by |EAP-IG score| whose edge-patched faithfulness reaches a target.

    The size is found on a geometric grid of 16 sizes, then by refining the interval in which the target is first
    reached until neighbouring sizes are tried; sizes that the grid passes over below that interval are not tried.

    Args:
        faithfulness: the target share of the clean-corrupt difference, in (0, 1].
        scores: edge scores to select by; computed with EAP-IG and `steps` where not given.

    Raises:
        MansuError: a target outside (0, 1], pairs on which the model shows no difference, or a target that even the
            full graph misses.
    """
    if not 0 < faithfulness <= 1:
        raise MansuError(f"circuit: faithfulness={faithfulness}; choose a target in (0, 1]")
    if scores is None:
        scores = edge_attribution(model, pairs, steps=steps, metric=metric, batch_size=batch_size, progress=progress)
    total = int(scores.exists.sum())
    grid = sorted({round(total ** (i / (_GRID - 1))) for i in range(_GRID)})
    below, at = 0, None
    while at is None or at - below > 1:
        values = _faithfulness_of_sizes(model, scores, grid, pairs, metric, batch_size)
        reached = [i for i, v in enumerate(values) if v >= faithfulness]
        if not reached:
            if at is None:
                raise MansuError(
                    f"circuit: no top-n circuit reaches faithfulness {faithfulness}; the best of sizes {grid} has "
                    f"{max(values):.3f}; lower the target or use another metric"
                )
            break
        first = reached[0]
        at, value = grid[first], values[first]
        below = grid[first - 1] if first else below
        width = at - below
        grid = sorted({below + max(1, round(width * i / _GRID)) for i in range(1, _GRID + 1)})
    return Circuit.top(scores, at, value)


def faithfulness(
    model: TransformerBridge,
    circuit: Circuit,
    pairs: PromptPairs,
    *,
    metric: Metric = logit_difference,
    batch_size: int = 64,
) -> float:
    """(m(C) - m(corrupt)) / (m(clean) - m(corrupt)), means over pairs, every edge outside C carrying its corrupt value.

    Exact: the edges are patched, nothing is linearised. 1 = the circuit does all of it; it may exceed 1.

    Raises:
        MansuError: the circuit belongs to another architecture, or the model shows no difference on these pairs.
    """
    graph = Graph.of(model)
    if circuit.writers != graph.writers or circuit.readers != graph.readers:
        raise MansuError("circuit: its writers and readers are not this model's; discover one on this model")
    return _faithfulness(model, circuit.mask[None].float(), pairs, metric, batch_size)[0]


def random_faithfulness(
    model: TransformerBridge,
    circuit: Circuit,
    pairs: PromptPairs,
    *,
    seeds: int = 5,
    metric: Metric = logit_difference,
    batch_size: int = 64,
) -> list[float]:
    """Faithfulness of random circuits drawn with as many edges as `circuit` has: its control."""
    exists = Graph.of(model).exists
    masks = torch.stack([random_mask(exists, circuit.n_edges, seed) for seed in range(seeds)])
    return _faithfulness(model, masks.float(), pairs, metric, batch_size)


def refreshed(model: TransformerBridge, circuit: Circuit, pairs: PromptPairs) -> Circuit:
    """The same edges with their faithfulness measured on other pairs or another model."""
    return replace(circuit, faithfulness=faithfulness(model, circuit, pairs), model=fingerprint(model))


def _faithfulness_of_sizes(
    model: TransformerBridge, scores: EdgeScores, sizes: list[int], pairs: PromptPairs, metric: Metric, batch_size: int
) -> list[float]:
    groups = kv_groups(scores.writers, scores.readers)
    masks = [prune(top_mask(scores, n), scores.writers, scores.readers, groups) for n in sizes]
    return _faithfulness(model, torch.stack(masks).float(), pairs, metric, batch_size)


def _faithfulness(
    model: TransformerBridge,
    masks: Float[Tensor, "mask writer reader"],
    pairs: PromptPairs,
    metric: Metric,
    batch_size: int,
) -> list[float]:
    values = patch_edges(model, pairs, masks, metric=metric, batch_size=batch_size).double().mean(1)
    clean, corrupt = _ends(model, pairs, metric, batch_size)
    if abs(clean - corrupt) < 1e-6:
        raise MansuError(
            f"pairs: the metric is {clean:.3g} on the clean and {corrupt:.3g} on the corrupt prompts; the model does "
            "not show this knowledge, so no circuit can be judged on it"
        )
    return ((values - corrupt) / (clean - corrupt)).tolist()


@torch.no_grad()
def _ends(model: TransformerBridge, pairs: PromptPairs, metric: Metric, batch_size: int) -> tuple[float, float]:
    clean = corrupt = 0.0
    for _, chunk in chunks(pairs, batch_size):
        clean += measured(metric, run(model, chunk.clean, chunk.lengths).float(), chunk).double().sum().item()
        corrupt += measured(metric, run(model, chunk.corrupt, chunk.lengths).float(), chunk).double().sum().item()
    return clean / len(pairs), corrupt / len(pairs)
