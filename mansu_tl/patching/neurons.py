"""Attribution patching of MLP neurons: which neurons of an MLP carry the clean/corrupt difference to the answer."""

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

from mansu_tl.data import Positions, PromptPairs, positions
from mansu_tl.data.forced import Forced, forced
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import Metric, logit_difference, metric_name, options_read
from mansu_tl.runs.passes import chunks, prepared, require_finite
from mansu_tl.runs.points import CLEAN, CORRUPT, Path, between


@dataclass(frozen=True)
class NeuronScores(Result):
    """First-order effect of restoring each MLP neuron.

    Attributes:
        tensor: mean over pairs of (h(clean) - h(corrupt)) . dm/dh summed over positions, or of its absolute value.
        signed: whether the sign was kept; if not, a neuron that serves one fact and hinders another still counts.
        at: where the gradient was taken: "both" (mean of the two ends), "clean", "corrupt" or "path".
        metric: name of the metric.
        per_position: signed mean over pairs by position, kept on request.
        positions: names of the rows of `per_position`.
    """

    tensor: Float[Tensor, "layer neuron"]
    signed: bool
    at: str
    metric: str
    per_position: Float[Tensor, "pos layer neuron"] | None = None
    positions: tuple[str, ...] = ()

    def to_dataframe(self) -> pd.DataFrame:
        """One row a neuron, largest |score| first."""
        layers, neurons = self.tensor.shape
        frame = pd.DataFrame(
            {
                "neuron": [f"MLP{i}.N{j}" for i in range(layers) for j in range(neurons)],
                "score": self.tensor.flatten().tolist(),
            }
        )
        return frame.sort_values("score", key=abs, ascending=False, kind="stable", ignore_index=True)

    def __repr__(self) -> str:
        layers, neurons = self.tensor.shape
        return f"NeuronScores({layers} x {neurons} neurons, gradient at {self.at}, {self.metric})"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "largest |score| first", "{:.4f}".format, rows=10),)


@torch_defaults()
def neuron_attribution(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    signed: bool = False,
    at: str = "both",
    steps: int | None = None,
    metric: Metric = logit_difference,
    per_position: bool | str = False,
    batch_size: int = 64,
    progress: bool = False,
) -> NeuronScores:
    """First-order effect of each MLP neuron: (h(clean) - h(corrupt)) . dm/dh.

    Args:
        signed: keep the sign when averaging over pairs; otherwise the mean of |score|, so that a neuron which serves
            one fact and hinders another still counts.
        at: "both" averages the gradients of the two ends, "clean" and "corrupt" take one.
        steps: average the gradient over so many embeddings between the ends instead (midpoint rule).
        per_position: also keep the scores by position: True or "start", "end", "span" (see `positions`).

    Raises:
        MansuError: an unknown end, or fewer than one step.
    """
    if at not in ("both", "clean", "corrupt"):
        raise MansuError(f"attribution: unknown end {at!r}; choose at='both', 'clean' or 'corrupt'")
    if steps is not None and steps < 1:
        raise MansuError(f"attribution: steps={steps}; choose at least one, or None for the ends")
    run = prepared(model, pairs, options_read(metric))
    ends = {"both": (CLEAN, CORRUPT), "clean": (CLEAN,), "corrupt": (CORRUPT,)}
    alphas = ends[at] if steps is None else between(steps)
    where = positions(run, "start" if per_position is True else per_position) if per_position else None
    options: dict[str, Any] = {"signed": signed, "metric": metric, "batch_size": batch_size, "progress": progress}
    tensor, by_position = mean_effects(model, run, alphas, where=where, **options)
    return NeuronScores(
        tensor=tensor,
        signed=signed,
        at=at if steps is None else "path",
        metric=metric_name(metric),
        per_position=None if where is None else by_position,
        positions=() if where is None else where.names,
    )


def mean_effects(
    model: TransformerBridge,
    pairs: PromptPairs | Forced[PromptPairs],
    alphas: Sequence[float] = (CLEAN, CORRUPT),
    *,
    signed: bool = False,
    metric: Metric = logit_difference,
    where: Positions | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[Float[Tensor, "layer neuron"], Float[Tensor, "pos layer neuron"]]:
    """The scores of pairs that are known to fit the model, over positions and by position (no rows without `where`).

    Args:
        alphas: the points between the ends at which the gradient is taken and averaged.
    """
    run = pairs if isinstance(pairs, Forced) else forced(pairs, options_read(metric))
    anatomy = Anatomy.of(model)
    neurons = anatomy.hooks("neurons")
    total = torch.zeros(anatomy.n_layers, anatomy.d_mlp, dtype=torch.float64)
    by_position = torch.zeros(0 if where is None else len(where.names), *total.shape, dtype=torch.float64)
    for piece, chunk in tqdm(list(chunks(run, batch_size)), desc="neurons", unit="batch", disable=not progress):
        path = Path(model, chunk, metric, at_ends=neurons, slopes=neurons)
        slopes = path.mean_gradients(alphas)
        clean, corrupt = (path.ends[end].values for end in (CLEAN, CORRUPT))
        for i, key in enumerate(neurons):
            token = (clean[key].float() - corrupt[key].float()) * slopes[key]
            score = chunk.by_pair(token.sum(1).double())
            total[i] += (score if signed else score.abs()).sum(0).cpu()
            if where is not None:
                where.add(by_position[:, i], piece, token)
    require_finite("neuron scores", total, model)
    return (total / len(pairs)).float(), (by_position / len(pairs)).float()
