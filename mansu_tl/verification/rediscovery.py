"""The forget circuit looked for again after the edit: does the fact travel by another path now?

Three answers. *Attribution*: the edges of the edited model are scored on the same pairs, and what lies outside the old
circuit is set against what lay there before (all masses relative to the original's total, so that a circuit which
merely faded does not look new). *Intervention*: the metric's change when only edges outside, or only edges inside, the
old circuit carry the clean prompt, exactly, by edge patching; what every edge carries beyond those inside needs at
least one edge outside. *Reference*: the same for the original under a quantizer,
which knows everything: the noise floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, EdgeScores, edge_attribution, patch_edges
from mansu_tl.data import PromptPairs
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.results.intervals import with_interval
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import Metric, logit_difference

ROUTES = ("every edge", "outside the old circuit", "inside the old circuit")


@dataclass(frozen=True)
class Rediscovery(Result):
    """Edge scores before, after and at the noise floor, and what each set of edges carries.

    Attributes:
        models: "original", "reference" (the original quantized) and the label of the edited model.
        mask: the old circuit.
        found: per model, as many edges as the old circuit has, of largest |score|.
        scores: per model, the edge scores (EAP-IG).
        effects: per model, route (`ROUTES`) and pair: the metric's rise over the corrupt prompt when these edges
            carry the clean one, in the metric's units.
        writers: row names.
        readers: column names.
        facts: the fact behind each pair.
    """

    models: tuple[str, ...]
    mask: Bool[Tensor, "writer reader"]
    found: Bool[Tensor, "model writer reader"]
    scores: Float[Tensor, "model writer reader"]
    effects: Float[Tensor, "model route pair"]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    facts: tuple[str, ...]

    def jaccard(self, model: int = -1) -> float:
        """Strongest edges of a model that are among the original's, over all edges of the two sets."""
        both, either = self.found[0] & self.found[model], self.found[0] | self.found[model]
        return int(both.sum()) / max(1, int(either.sum()))

    def mass(self, model: int = -1, *, outside: bool = True) -> float:
        """Sum of |score| outside (or inside) the old circuit, as a share of the original's over all edges."""
        where = ~self.mask if outside else self.mask
        return (self.scores[model].double().abs()[where].sum() / self.scores[0].double().abs().sum()).item()

    def carried(self, model: int = -1, route: str = ROUTES[1]) -> tuple[float, float, float]:
        """What a route carries, as a share of what every edge of the original does, with its 95 % interval.

        Raises:
            MansuError: no such route.
        """
        if route not in ROUTES:
            raise MansuError(f"rediscovery: no route {route!r}; choose one of {', '.join(ROUTES)}")
        value, low, high = self._carried("share", model, route).values()
        return value, low, high

    def _carried(self, name: str, model: int, route: str) -> dict[str, float]:
        whole = self.effects[0, 0].double().mean()
        return with_interval(name, self.effects[model, ROUTES.index(route)].double() / whole, self.facts)

    def new_edges(self, n: int = 10) -> pd.DataFrame:
        """The strongest edges of the edited model outside the old circuit, with the original's scores beside."""
        size = self.scores[-1].abs().masked_fill(self.mask, 0)
        order = size.flatten().sort(descending=True, stable=True).indices[:n]
        kept = [i for i in order.tolist() if size.flatten()[i] > 0]
        rows, columns = [i // len(self.readers) for i in kept], [i % len(self.readers) for i in kept]
        frame = pd.DataFrame({"writer": [self.writers[i] for i in rows], "reader": [self.readers[i] for i in columns]})
        for m, name in enumerate(self.models):
            frame[name] = self.scores[m, rows, columns].tolist()
        return frame

    def to_dataframe(self) -> pd.DataFrame:
        """One row a model: masses and what is carried, as shares of the original's whole, and Jaccard with its edges."""
        rows = []
        for m, name in enumerate(self.models):
            row: dict[str, Any] = {"model": name, "mass_inside": self.mass(m, outside=False)}
            row |= {"mass_outside": self.mass(m), "jaccard": self.jaccard(m)}
            for route, key in zip(ROUTES, ("whole", "outside", "inside"), strict=True):
                row |= self._carried(f"carried_{key}", m, route)
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        value, low, high = self.carried()
        return (
            f"Rediscovery({self.models[-1]}: outside the old circuit {100 * value:.1f} % [{100 * low:.1f}, "
            f"{100 * high:.1f}] of the effect (original {100 * self.carried(0)[0]:.1f} %), mass there "
            f"{self.mass():.3f} (original {self.mass(0):.3f}), Jaccard {self.jaccard():.2f})"
        )

    def _tables(self) -> Sequence[Table]:
        new = Table(self.new_edges(), "edges outside the old circuit", "{:.3f}".format)
        return (Table(self.to_dataframe(), form="{:.3f}".format), new)


@torch_defaults()
def rediscover(
    original: TransformerBridge,
    edited: TransformerBridge,
    circuit: Circuit,
    pairs: PromptPairs,
    *,
    reference: TransformerBridge | None = None,
    steps: int = 5,
    metric: Metric = logit_difference,
    batch_size: int = 64,
    label: str = "edited",
    progress: bool = False,
) -> Rediscovery:
    """Score the edited model's edges anew and see what the edges outside the old circuit carry.

    The circuit is not discovered by a faithfulness target, which a model that shows no difference cannot reach: as
    many of the strongest edges are taken as the old circuit has.

    Args:
        circuit: the forget circuit of the original.
        reference: the noise floor, usually `quantize(original, "nf4")`.
        steps: of EAP-IG.
        label: what the edited model is, for tables and figures.
        progress: show progress bars.

    Raises:
        MansuError: a circuit that is empty or of another architecture, or an original that shows no difference between
            clean and corrupt prompts.
    """
    if circuit.n_edges == 0:
        raise MansuError("circuit: it has no edge, so nothing can lie outside it; lower the threshold or the target")
    models = {"original": original} | ({} if reference is None else {"reference": reference}) | {label: edited}
    if len(models) < (2 if reference is None else 3):
        raise MansuError(f"rediscovery: label {label!r} is taken; choose another one")
    scores, strongest, effects = [], [], []
    for model in models.values():
        edge_scores = edge_attribution(
            model, pairs, steps=steps, metric=metric, batch_size=batch_size, progress=progress
        )
        if (edge_scores.writers, edge_scores.readers) != (circuit.writers, circuit.readers):
            raise MansuError("circuit: its writers and readers are not this model's; discover one on the original")
        scores.append(edge_scores.tensor)
        strongest.append(_strongest(edge_scores, circuit.n_edges))
        masks = torch.stack(
            [edge_scores.exists, edge_scores.exists & ~circuit.mask, circuit.mask, torch.zeros_like(edge_scores.exists)]
        )
        values = patch_edges(model, pairs, masks.float(), metric=metric, batch_size=batch_size, progress=progress)
        effects.append(values[:3] - values[3])
    if abs(effects[0][0].double().mean().item()) < 1e-6:
        raise MansuError(
            "pairs: the original shows no difference between clean and corrupt prompts; use pairs whose answer it knows"
        )
    return Rediscovery(
        tuple(models), circuit.mask, torch.stack(strongest), torch.stack(scores), torch.stack(effects).cpu().float(),
        circuit.writers, circuit.readers, pairs.facts,
    )  # fmt: skip


def _strongest(scores: EdgeScores, n: int) -> Bool[Tensor, "writer reader"]:
    """The `n` edges of largest |score|, not pruned."""
    mask = torch.zeros(scores.exists.numel(), dtype=torch.bool)
    size = scores.tensor.abs().masked_fill(~scores.exists, -1).flatten()
    mask[size.sort(descending=True, stable=True).indices[:n]] = True
    return mask.view_as(scores.exists)
