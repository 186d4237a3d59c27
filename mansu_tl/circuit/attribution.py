"""Edge attribution patching, exact and without any bridge flag.

The score of an edge u -> v is the mean over pairs of the sum over positions of

    (a_u(clean) - a_u(corrupt)) . dm/d input_v,

the first-order change of the metric m when u's message to v alone goes from corrupt to clean. EAP (Syed et al. 2023,
arXiv 2310.10348) takes the gradient at one end; EAP-IG (Hanna et al. 2024, arXiv 2403.17806) averages it over
embeddings interpolated between the ends; "clean-corrupted" averages the gradients of the two ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.contraction import Contraction
from mansu_tl.circuit.gradients import Gatherer
from mansu_tl.circuit.graph import Graph
from mansu_tl.circuit.memory import plan
from mansu_tl.circuit.scores import EdgeScores
from mansu_tl.data import PromptPairs
from mansu_tl.data.positions import Positions, positions
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, fingerprint
from mansu_tl.runs import distributed
from mansu_tl.runs.ablation import Ablation
from mansu_tl.runs.metrics import Metric, logit_difference
from mansu_tl.runs.passes import chunks, metric_name, prepared, require_finite

# steps="auto" starts here and doubles at most this often (320 steps).
_FIRST_STEPS, _DOUBLINGS = 5, 6


@torch_defaults()
def edge_attribution(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    method: str = "eap-ig",
    steps: int | str = 5,
    tolerance: float = 0.02,
    rule: str = "midpoint",
    at: str = "clean",
    ablation: Ablation | None = None,
    metric: Metric = logit_difference,
    per_pair: bool = False,
    per_position: bool | str = False,
    max_memory: str | int | None = None,
    batch_size: int | None = None,
    data_parallel: bool = False,
    progress: bool = False,
) -> EdgeScores:
    """Score every edge of the model's graph on the pairs.

    Args:
        method: "eap" takes one gradient, "eap-ig" averages `steps` of them, "clean-corrupted" those of the two ends.
        steps: interpolation steps of EAP-IG; "auto" doubles them from 5 until the completeness residual is under
            `tolerance`.
        tolerance: for steps="auto", the residual allowed as a share of the metric's change.
        rule: where in its interval each step sits; "left" starts at the corrupt end and never reaches the clean one.
        at: the end at which EAP takes its gradient.
        ablation: what a writer's change is measured from (EAP only; default: its value on the corrupt prompt).
        metric: maps last-token logits and pairs to one number a pair.
        per_pair: also keep the scores of every pair (for intervals).
        per_position: also keep the scores by position: True or "start" counts from the first token, "end" from the
            last one, "span" gathers the pairs' named spans.
        max_memory: what the work may take beside the model ("4GB", bytes); None = half of what is free.
        batch_size: at most so many pairs in a forward pass; None = 64.
        data_parallel: share the pairs out over the processes of `torch.distributed`. Every process calls this with
            the same pairs and gets the same scores.
        progress: show a progress bar over forward and backward passes.

    Raises:
        MansuError: an unknown method, rule or end, fewer than one step, or no convergence with steps="auto"; a metric,
            a memory budget or pairs that do not fit.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> scores = mtl.edge_attribution(model, task.forget_pairs[:8], steps=5)
        >>> tuple(scores.tensor.shape) == (len(scores.writers), len(scores.readers))
        True
    """
    if method not in ("eap", "eap-ig", "clean-corrupted"):
        raise MansuError(f"attribution: unknown method {method!r}; choose eap, eap-ig or clean-corrupted")
    if method == "eap" and at not in ("clean", "corrupt"):
        raise MansuError(f"attribution: unknown end {at!r}; choose at='clean' or at='corrupt'")
    if method == "eap-ig" and rule not in ("midpoint", "left", "right"):
        raise MansuError(f"attribution: unknown rule {rule!r}; choose midpoint, left or right")
    ablation = Ablation() if ablation is None else ablation
    if ablation.kind != "corrupt" and (method != "eap" or at != "clean"):
        raise MansuError(
            f"attribution: {ablation.kind} ablation has no corrupt end to take gradients at; use method='eap', "
            "at='clean'"
        )
    pairs = prepared(model, pairs)
    if data_parallel:
        distributed.require_group()
    where = positions(pairs, "start" if per_position is True else per_position) if per_position else None
    job = _Job(model, pairs, metric, ablation, per_pair, where, max_memory, batch_size, data_parallel, progress)
    if method != "eap-ig":
        alphas = [1.0, 0.0] if method == "clean-corrupted" else [1.0 if at == "clean" else 0.0]
        return job.scores(alphas, method, "both ends" if method == "clean-corrupted" else at)
    if steps != "auto":
        if not isinstance(steps, int) or steps < 1:
            raise MansuError(f'attribution: steps={steps}; EAP-IG needs a whole number from 1 up, or "auto"')
        return job.scores(_alphas(steps, rule), method, rule)
    if not tolerance > 0:
        raise MansuError(f"attribution: tolerance={tolerance}; choose a share above 0, such as 0.02")
    for doubling in range(_DOUBLINGS + 1):
        count = _FIRST_STEPS * 2**doubling
        out = job.scores(_alphas(count, rule), method, rule)
        if out.relative_residual <= tolerance:
            return out
    raise MansuError(
        f"attribution: after {count} steps the residual is still {out.relative_residual:.3g} of the metric's change, "
        f"tolerance={tolerance}; raise the tolerance, use rule='midpoint', or a smoother metric"
    )


def _alphas(steps: int, rule: str) -> list[float]:
    shift = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return [(i + shift) / steps for i in range(steps)]


@dataclass(frozen=True)
class _Job:
    """What stays the same when the steps are doubled."""

    model: TransformerBridge
    pairs: PromptPairs
    metric: Metric
    ablation: Ablation
    per_pair: bool
    where: Positions | None
    max_memory: str | int | None
    batch_size: int | None
    data_parallel: bool
    progress: bool

    def scores(self, alphas: list[float], method: str, rule: str) -> EdgeScores:
        """The scores with gradients at these points between the corrupt (0) and the clean (1) embedding."""
        model, pairs, graph, anatomy = self.model, self.pairs, Graph.of(self.model), Anatomy.of(self.model)
        mine = distributed.share(len(pairs)) if self.data_parallel else slice(0, len(pairs))
        shape = graph.exists.shape
        total = torch.zeros(shape, dtype=torch.float64)
        by_pair = torch.zeros(mine.stop - mine.start, *shape) if self.per_pair else None
        by_position = torch.zeros(len(self.where.names), *shape, dtype=torch.float64) if self.where else None
        ends = torch.zeros(2, dtype=torch.float64)
        if mine.stop > mine.start:
            own = pairs[mine]
            cut = plan(model, own, len(alphas), max_memory=self.max_memory, batch_size=self.batch_size)
            contraction = Contraction(model, anatomy, graph, cut.tokens)
            batches = list(chunks(own, cut.pairs))
            bar = tqdm(total=len(batches) * len(alphas), desc=f"{method} edges", unit="pass", disable=not self.progress)
            with bar:
                for piece, batch in batches:
                    gatherer = Gatherer(model, anatomy, batch, self.metric, self.ablation, bar.update)
                    changes, gradients = gatherer.gather(alphas)
                    ends[0] += changes.metric_clean.double().sum().cpu()
                    ends[1] += changes.metric_other.double().sum().cpu()
                    index = None if self.where is None else self.where.index[mine][piece]
                    groups, rows = self._groups(batch, index)
                    parts = contraction.scores(changes, gradients, groups, len(rows)).cpu()
                    total += parts.double().sum(0)
                    if by_pair is not None:
                        by_pair[piece].index_add_(0, rows[:, 0], parts)
                    if by_position is not None:
                        by_position.index_add_(0, rows[:, 1], parts.double())
        if self.data_parallel:
            total, ends = distributed.summed(total), distributed.summed(ends)
            by_pair = None if by_pair is None else distributed.gathered(by_pair, len(pairs))
            by_position = None if by_position is None else distributed.summed(by_position)
        tensor = total / len(pairs) * graph.exists
        require_finite("edge scores", tensor, model)
        clean, other = (ends / len(pairs)).tolist()
        return EdgeScores(
            tensor=tensor.float(),
            writers=graph.writers,
            readers=graph.readers,
            exists=graph.exists,
            method=method,
            rule=rule,
            steps=len(alphas),
            metric=metric_name(self.metric),
            metric_clean=clean,
            metric_corrupt=other,
            residual=abs(tensor[0].sum().item() - (clean - other)),
            model=fingerprint(model),
            per_pair=None if by_pair is None else by_pair * graph.exists,
            per_position=None if by_position is None else (by_position / len(pairs) * graph.exists).float(),
            positions=() if self.where is None else self.where.names,
        )

    def _groups(
        self, batch: PromptPairs, index: Int[Tensor, "pair pos"] | None
    ) -> tuple[Int[Tensor, " token"], Int[Tensor, "group 2"]]:
        """The group of every token, and the (pair, position row) behind each group."""
        count, width = batch.clean.shape
        real = torch.arange(width)[None] < batch.lengths.cpu()[:, None]
        pair = torch.arange(count)[:, None].expand(count, width) if self.per_pair else torch.zeros(count, width).long()
        row = torch.zeros(count, width).long() if index is None else index.cpu()
        n_rows = 1 if self.where is None else len(self.where.names)
        if self.ablation.kind == "corrupt":
            # In front of the first changed token both runs are the same, so no writer changes there.
            real &= (batch.clean != batch.corrupt).cpu().cumsum(1) > 0
        groups = torch.where(real & (row >= 0), pair * n_rows + row, -1).flatten()
        n_pairs = count if self.per_pair else 1
        return groups, torch.cartesian_prod(torch.arange(n_pairs), torch.arange(n_rows)).reshape(-1, 2)
