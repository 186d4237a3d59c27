"""Path patching of named edges: the exact effect of single messages, one at a time or all together.

Noising runs the clean prompt while the edge alone carries its ablated value; denoising runs the corrupt prompt while
the edge alone carries its clean one. In both, the edge's writer itself is left alone, its message to that one reader is
replaced, and everything after the reader is recomputed (Goldowsky-Dill et al. 2023, arXiv 2304.05969).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.evaluation import clean_metric
from mansu_tl.circuit.graph import Graph
from mansu_tl.circuit.intervention import patched
from mansu_tl.data import PromptPairs
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.results.result import Result, Table
from mansu_tl.results.serialise import MismatchError
from mansu_tl.runs.ablation import Ablation
from mansu_tl.runs.metrics import Metric, logit_difference, metric_name, options_read
from mansu_tl.runs.passes import prepared

DIRECTIONS = ("noising", "denoising")


@dataclass(frozen=True)
class PathEffects(Result):
    """What messages along edges do to the metric.

    Attributes:
        per_pair: change of the metric, in its units: patched minus unpatched run; one row an edge, or one for all.
        edges: the edges that were patched, (writer, reader).
        together: all in one run.
        direction: "noising" or "denoising".
        metric: name of the metric.
        metric_clean: its mean on the clean prompts.
        metric_corrupt: its mean on the corrupt prompts.
        ablation: what noised edges carry.
    """

    per_pair: Float[Tensor, "row pair"]
    edges: tuple[tuple[str, str], ...]
    together: bool
    direction: str
    metric: str
    metric_clean: float
    metric_corrupt: float
    ablation: str

    @property
    def effects(self) -> Float[Tensor, " row"]:
        """Mean change of the metric over pairs."""
        return self.per_pair.mean(1)

    @property
    def shares(self) -> Float[Tensor, " row"]:
        """The effect over what separates the clean from the corrupt prompts: noising the part that is lost, denoising
        the part that is restored. NaN if nothing separates them."""
        gap = self.metric_clean - self.metric_corrupt
        if gap == 0:
            return torch.full_like(self.effects, torch.nan)
        return self.effects / (-gap if self.direction == "noising" else gap)

    def to_dataframe(self) -> pd.DataFrame:
        """One row an edge, in the order given; one row in all if they were patched together."""
        names = [("all", f"{len(self.edges)} edges")] if self.together else list(self.edges)
        frame = pd.DataFrame(names, columns=["writer", "reader"])
        frame["effect"], frame["share"] = self.effects.tolist(), self.shares.tolist()
        return frame

    def _check(self) -> None:
        rows = 1 if self.together else len(self.edges)
        if len(self.per_pair) != rows:
            raise MismatchError(f"'per_pair' has {len(self.per_pair)} rows for {rows} edges")

    def __repr__(self) -> str:
        how = "together" if self.together else "one by one"
        return f"PathEffects({len(self.edges)} edges {how}, {self.direction}, {self.metric})"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), form="{:.4f}".format),)


@torch_defaults()
def path_patching(
    model: TransformerBridge,
    pairs: PromptPairs,
    edges: Sequence[tuple[str, str]],
    *,
    direction: str = "noising",
    together: bool = False,
    ablation: Ablation | None = None,
    metric: Metric = logit_difference,
    batch_size: int = 64,
    progress: bool = False,
) -> PathEffects:
    """The exact effect of each edge's message, such as ("L0H1", "L1KV0.v"), or of all of them together.

    Args:
        direction: "noising" breaks the edge in the clean run, "denoising" mends it in the corrupt run.
        together: patch all the edges in one run.
        ablation: what a noised edge carries; its value on the corrupt prompt where not given.

    Raises:
        MansuError: no edges, one that the model does not have (by its name), an unknown direction, or denoising with
            another ablation than "corrupt", which leaves no corrupt run to mend.
    """
    if direction not in DIRECTIONS:
        raise MansuError(f"path patching: unknown direction {direction!r}; choose noising or denoising")
    ablation = ablation or Ablation()
    if direction == "denoising" and ablation.kind != "corrupt":
        raise MansuError(
            f"path patching: denoising mends the corrupt run, {ablation.kind} ablation has none; use direction='noising'"
        )
    run = prepared(model, pairs, options_read(metric))
    named = tuple((writer, reader) for writer, reader in edges)
    if not named:
        raise MansuError("path patching: no edges given; name at least one, such as ('embed', 'logits')")
    graph = Graph.of(model)
    picked = [graph.mask(named)] if together else [graph.mask([edge]) for edge in named]
    masks = 1 - torch.stack([torch.zeros_like(graph.exists), *picked]).float()
    base, other = (run, run.exchanged()) if direction == "noising" else (run.exchanged(), run)
    values, _ = patched(model, base, masks, ablation, metric, batch_size, progress)
    unpatched = values[0].double().mean().item()
    far = clean_metric(model, other, metric, batch_size)
    clean, corrupt = (unpatched, far) if direction == "noising" else (far, unpatched)
    return PathEffects(
        per_pair=values[1:] - values[0],
        edges=named,
        together=together,
        direction=direction,
        metric=metric_name(metric),
        metric_clean=clean,
        metric_corrupt=corrupt,
        ablation=ablation.kind,
    )
