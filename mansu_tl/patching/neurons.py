"""Attribution patching of MLP neurons: which neurons of an MLP carry the clean/corrupt difference to the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs, positions
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import Metric, logit_difference
from mansu_tl.runs.passes import Hook, chunks, keep, measured, metric_name, prepared, require_finite, run


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
        return frame.loc[frame["score"].abs().sort_values(ascending=False, kind="stable").index].reset_index(drop=True)

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
    pairs = prepared(model, pairs)
    anatomy = Anatomy.of(model)
    alphas = {"both": [1.0, 0.0], "clean": [1.0], "corrupt": [0.0]}[at]
    if steps is not None:
        alphas = [(i + 0.5) / steps for i in range(steps)]
    where = positions(pairs, "start" if per_position is True else per_position) if per_position else None
    total = torch.zeros(anatomy.n_layers, anatomy.d_mlp, dtype=torch.float64)
    shape = (0 if where is None else len(where.names), anatomy.n_layers, anatomy.d_mlp)
    by_position = torch.zeros(shape, dtype=torch.float64)
    for piece, chunk in tqdm(list(chunks(pairs, batch_size)), desc="neurons", unit="batch", disable=not progress):
        values, slopes = _values_and_slopes(model, chunk, metric, alphas)
        for i in range(anatomy.n_layers):
            token = (values[0][i].float() - values[1][i].float()) * slopes[i]
            score = token.sum(1).double()
            total[i] += (score if signed else score.abs()).sum(0).cpu()
            if where is not None:
                index = where.index[piece].flatten().cpu()
                by_position[:, i].index_add_(0, index[index >= 0], token.flatten(0, 1).double().cpu()[index >= 0])
    require_finite("neuron scores", total, model)
    return NeuronScores(
        tensor=(total / len(pairs)).float(),
        signed=signed,
        at=at if steps is None else "path",
        metric=metric_name(metric),
        per_position=None if where is None else (by_position / len(pairs)).float(),
        positions=() if where is None else where.names,
    )


def _values_and_slopes(
    model: TransformerBridge, pairs: PromptPairs, metric: Metric, alphas: list[float]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Per layer the neurons' values at the clean and the corrupt end, and the mean gradient over the points."""
    layers = range(Anatomy.of(model).n_layers)
    keys = {f"h{i}": f"blocks.{i}.mlp.out.hook_in" for i in layers}
    ends: list[dict[str, Tensor]] = []
    for tokens in (pairs.clean, pairs.corrupt):
        kept: dict[str, Tensor] = {}
        hooks: list[Hook] = [("blocks.0.hook_in", keep(kept, "embed"))]
        with torch.no_grad():
            run(model, tokens, pairs.lengths, hooks + [(hook, keep(kept, key)) for key, hook in keys.items()])
        ends.append(kept)
    slopes: list[Tensor] = []
    for alpha in alphas:
        start = ends[0]["embed"] if alpha == 1 else ends[1]["embed"] + alpha * (ends[0]["embed"] - ends[1]["embed"])
        start = start.detach().requires_grad_()
        kept = {}

        def begin(stream: Tensor, hook: object, start: Tensor = start) -> Tensor:
            return start

        with torch.enable_grad():
            every: list[Hook] = [("blocks.0.hook_in", begin), *((hook, keep(kept, key)) for key, hook in keys.items())]
            logits = run(model, pairs.clean, pairs.lengths, every)
            value = measured(metric, logits.float(), pairs).sum()
            grads = [grad.float() for grad in torch.autograd.grad(value, [kept[key] for key in keys])]
        slopes = grads if not slopes else [a + b for a, b in zip(slopes, grads, strict=True)]
    return [[end[f"h{i}"] for i in layers] for end in ends], [slope / len(alphas) for slope in slopes]
