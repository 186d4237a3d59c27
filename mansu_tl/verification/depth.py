"""Erasure depth: at which layers does the edited model's residual stream still hold the answer for the original?

In the spirit of the Unlearning Depth Score (UDS, Lee et al. 2026, arXiv 2605.24614). For each layer l the original
model is run with the stream after block l taken from another model on the same prompt: what the original's later
layers can still read out of it. With the drop D_l(S) = m(original) - m(original, stream l from model S),

    depth = sum_l D_l(never) clip(D_l(edited) / D_l(never), 0, 1) / sum_l D_l(never)

per pair, over the layers with D_l(never) above a threshold (those that hold the knowledge). 0 = as intact as in the
original, 1 = as absent as in a model that never learnt it. As in UDS, but the definition is ours: the metric is by
default the log-odds of the answer instead of its log-probability, and the stream is by default taken over at all
positions (what was written where the subject stands counts too; UDS replaces only where the answer is predicted).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs, Sequences
from mansu_tl.data.forced import Forced, forced
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import home, require_ready
from mansu_tl.results.intervals import interval_over_facts, with_interval
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import Metric, choice_log_odds, measured, metric_name, options_read
from mansu_tl.runs.passes import Hook, check, chunks, run
from mansu_tl.runs.streams import require_one_shape, residual_streams, stream_hooks

POSITIONS = ("all", "last")


@dataclass(frozen=True)
class ErasureDepth(Result):
    """Drops of the metric by layer and pair, and what they come to.

    Attributes:
        label: what the edited model is.
        layers: "L0", "L1", ...: the stream after each block.
        clean: the original's own metric on each pair.
        never: its drop with the never-trained model's stream, in the metric's units.
        edited: its drop with the edited model's stream.
        threshold: least drop, with the never-trained stream, of a layer that counts.
        positions: "all" or "last".
        metric: name of the metric.
        facts: the fact behind each pair.
    """

    label: str
    layers: tuple[str, ...]
    clean: Float[Tensor, " pair"]
    never: Float[Tensor, "layer pair"]
    edited: Float[Tensor, "layer pair"]
    threshold: float
    positions: str
    metric: str
    facts: tuple[str, ...]

    @property
    def per_pair(self) -> Float[Tensor, " pair"]:
        """The depth of every pair; NaN where no layer passes the threshold."""
        counts = (self.never > self.threshold).double()
        never, edited = self.never.double(), self.edited.double()
        erased = torch.minimum(edited.clamp_min(0), never.clamp_min(0)) * counts
        return erased.sum(0) / (never * counts).sum(0)

    @property
    def value(self) -> float:
        """The mean depth over the pairs that have one."""
        return self.per_pair.nanmean().item()

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % bootstrap interval over facts."""
        depths = self.per_pair
        there = ~depths.isnan()
        return interval_over_facts(depths[there], [f for f, yes in zip(self.facts, there.tolist(), strict=True) if yes])

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer: mean drops with either stream, the share of pairs at which the layer counts, the erased
        share (mean edited drop over mean never-trained drop, not clipped) with its 95 % interval of the edited drop."""
        rows = []
        for i, layer in enumerate(self.layers):
            never = self.never[i].double().mean().item()
            row: dict[str, Any] = {"label": self.label, "layer": layer, "never_drop": never}
            row |= with_interval("edited_drop", self.edited[i], self.facts, bounds="edited")
            row["counted"] = (self.never[i] > self.threshold).double().mean().item()
            row["erased"] = row["edited_drop"] / never if never > self.threshold else float("nan")
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"ErasureDepth({self.label}: {self.value:.3f} [{low:.3f}, {high:.3f}], {len(self.layers)} layers, "
            f"{self.positions} positions, {self.metric})"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "by layer", "{:.3f}".format, rows=40),)


@torch_defaults()
def erasure_depth(
    original: TransformerBridge,
    edited: TransformerBridge,
    never: TransformerBridge,
    pairs: PromptPairs,
    *,
    metric: Metric = choice_log_odds,
    positions: str = "all",
    threshold: float = 0.05,
    batch_size: int = 64,
    label: str = "edited",
    progress: bool = False,
) -> ErasureDepth:
    """Patch streams of the edited and of the never-trained model into the original, layer by layer.

    Only the clean prompts of the pairs are run.

    Args:
        never: a model of the same shape that was trained without the facts.
        positions: where the stream is taken over: "all", or "last" as in UDS, which is where the answer's tokens are
            predicted.
        threshold: least drop in the metric's units, with the never-trained stream, of a layer that counts (UDS: .05).
        label: what the edited model is, for tables and figures.
        progress: show a progress bar over batches.

    Raises:
        MansuError: models of different shape, unknown positions, or a never-trained model whose streams lower the
            metric at no layer.
    """
    if positions not in POSITIONS:
        raise MansuError(f"depth: unknown positions {positions!r}; choose all or last")
    for model in (original, edited, never):
        check(model, pairs)
        require_ready(model, pairs.clean)
    require_one_shape("depth", original, edited=edited, never=never)
    rows = forced(pairs.to(home(original)), options_read(metric))
    after_blocks = list(stream_hooks(original).items())[1:]
    clean, drops = torch.empty(len(pairs)), torch.empty(2, len(after_blocks), len(pairs))
    batches = list(chunks(rows, batch_size))
    with torch.no_grad():
        for where, batch in tqdm(batches, desc=f"depth {label}", unit="batch", disable=not progress):
            before = measured(metric, run(original, batch.clean, batch.places).float(), batch)
            clean[where] = before.cpu()
            for s, source in enumerate((never, edited)):
                streams, _ = residual_streams(source, Sequences(batch.clean, batch.lengths))
                for i, ((_, name), stream) in enumerate(zip(after_blocks, streams[1:], strict=True)):
                    hook = _put_in(name, stream, batch, positions)
                    after = measured(metric, run(original, batch.clean, batch.places, [hook]).float(), batch)
                    drops[s, i, where] = (before - after).cpu()
    if not (drops[0] > threshold).any():
        raise MansuError(
            f"depth: the never-trained model's streams lower {metric_name(metric)} by at most {drops[0].max():.3g} at any "
            f"layer, threshold={threshold}; pass a model that does not know the facts"
        )
    names = tuple(layer for layer, _ in after_blocks)
    return ErasureDepth(label, names, clean, drops[0], drops[1], threshold, positions, metric_name(metric), pairs.facts)


def _put_in(name: str, value: Tensor, batch: Forced[PromptPairs], positions: str) -> Hook:
    """A hook that puts another model's stream in place of the one it sees."""

    def replace(stream: Tensor, hook: object) -> Tensor:
        other = value.to(stream)
        if positions == "all":
            return other
        asked = batch.places.on(stream.device)
        patched = stream.clone()
        patched[asked] = other[asked]
        return patched

    return name, replace
