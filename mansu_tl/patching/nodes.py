"""Attribution patching of nodes: one backward pass instead of one intervention a node (Nanda 2023; Kramar et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs
from mansu_tl.errors import MansuError
from mansu_tl.metrics import Metric, logit_difference
from mansu_tl.models import component_map
from mansu_tl.patching.runs import check, chunks, heads_last, keep, measured, metric_name, record, run


@dataclass(frozen=True)
class NodeScores:
    """First-order effect of restoring each writer.

    Attributes:
        tensor: mean over pairs of (a(clean) - a(corrupt)) . dm/da, summed over positions; positive = supports the answer.
        writers: names.
        at: the end at which the gradient was taken.
        metric: name of the metric.
    """

    tensor: Float[Tensor, " writer"]
    writers: tuple[str, ...]
    at: str
    metric: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row a writer, in order of computation."""
        return pd.DataFrame({"writer": self.writers, "score": self.tensor.tolist()})


def node_attribution(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    at: str = "clean",
    metric: Metric = logit_difference,
    batch_size: int = 64,
) -> NodeScores:
    """Attribution patching of every writer, from gradients at the writers' own outputs (not at edges).

    A node's score equals the sum of its outgoing EAP edge scores taken at the same end.
    """
    if at not in ("clean", "corrupt"):
        raise MansuError(f"attribution: unknown end {at!r}; choose at='clean' or at='corrupt'")
    check(model, pairs)
    cmap = component_map(model)
    total = torch.zeros(len(cmap.writers), dtype=torch.float64)
    layers = range(cmap.n_layers)
    names = {"embed": "blocks.0.hook_in"}
    names |= {f"z{i}": f"blocks.{i}.attn.o.hook_in" for i in layers}
    names |= {f"mlp{i}": f"blocks.{i}." + ("ln2_post.hook_out" if cmap.post_norms else "mlp.hook_out") for i in layers}
    for _, chunk in chunks(pairs, batch_size):
        clean, corrupt = (record(model, tokens, chunk.lengths) for tokens in (chunk.clean, chunk.corrupt))
        start = (clean if at == "clean" else corrupt).embed.detach().requires_grad_()
        kept: dict[str, Tensor] = {}
        hooks = [(hook, keep(kept, key)) for key, hook in names.items() if key != "embed"]

        def begin(stream: Tensor, hook: object, start: Tensor = start) -> Tensor:
            return start

        with torch.enable_grad():
            tokens = chunk.clean if at == "clean" else chunk.corrupt
            logits = run(model, tokens, chunk.lengths, [("blocks.0.hook_in", begin), *hooks])
            value = measured(metric, logits.float(), chunk).sum()
            keys = [key for key in names if key != "embed"]
            grads = torch.autograd.grad(value, [start, *(kept[key] for key in keys)])
        by_key = dict(zip(["embed", *keys], grads, strict=True))
        parts = [_dot(by_key["embed"], clean.embed - corrupt.embed)[None]]
        for i in layers:
            gradient = heads_last(by_key[f"z{i}"], cmap.n_heads)
            parts.append((gradient * (clean.z[i] - corrupt.z[i])).sum((0, 1, 3)))
            parts.append(_dot(by_key[f"mlp{i}"], clean.mlp_out[i] - corrupt.mlp_out[i])[None])
        total += torch.cat(parts).double().cpu()
    return NodeScores((total / len(pairs)).float(), cmap.writers, at, metric_name(metric))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()
