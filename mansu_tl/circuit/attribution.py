"""Edge attribution patching, exact and without any bridge flag.

The score of an edge u -> v is the mean over pairs of the sum over positions of

    (a_u(clean) - a_u(corrupt)) . dm/d input_v,

the first-order change of the metric m when u's message to v alone goes from corrupt to clean. EAP (Syed et al. 2023,
arXiv 2310.10348) takes the gradient at one end; EAP-IG (Hanna et al. 2024, arXiv 2403.17806) averages it over
embeddings interpolated between the ends; "clean-corrupted" averages the gradients of the two ends.

`_Job.scores` walks through a batch of pairs in three steps:

1. **Gather** (`_gathered`): one forward and backward pass a point, gradients taken at each projection's output (q, k, v of
   d_head numbers) rather than at a per-head copy of its input. With x^ the normalized input, s its scale, w the norm's
   weight, W' = W diag(w), b the projection's bias (the norm's included), the gradient at the norm's input is, at point i,

       ( W'^T g_i - mean(W'^T g_i) [LayerNorm only] - x^_i <q_i - b, g_i> / d_model ) / s_i,

   so sum_i g_i / s_i is all that has to be kept, with a correction of rank `steps`.
2. **Change** (`_changes`): what every writer wrote on the clean prompt minus what it writes when it is switched off.
3. **Contract** (`Contraction`): <change of u, gradient at v> for all edges, token by token. Vectors of d_model numbers
   exist only for a few tokens at a time, built layer by layer, so the memory of this step does not grow with the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.contraction import Changes, Contraction, LayerSlopes, Slopes, normalized
from mansu_tl.circuit.graph import Graph
from mansu_tl.circuit.memory import Plan, plan
from mansu_tl.circuit.scores import EdgeScores
from mansu_tl.data import PromptPairs
from mansu_tl.data.forced import Forced
from mansu_tl.data.positions import Positions, positions
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, NormWeights, attention_weights, fingerprint, norm_weights
from mansu_tl.runs import distributed
from mansu_tl.runs.ablation import Ablation
from mansu_tl.runs.metrics import Metric, logit_difference, measured, metric_name, options_read
from mansu_tl.runs.passes import by_length, heads_last, prepared, require_finite
from mansu_tl.runs.points import CLEAN, CORRUPT, End, Path, Point, between

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
        metric: maps the logits at the asked positions and pairs to one number a pair; see `mansu_tl.runs.metrics`.
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
    run = prepared(model, pairs, options_read(metric))
    if data_parallel:
        distributed.require_group()
    where = positions(run, "start" if per_position is True else per_position) if per_position else None
    job = _Job(model, run, metric, ablation, per_pair, where, max_memory, batch_size, data_parallel, progress)
    if method != "eap-ig":
        alphas = [1.0, 0.0] if method == "clean-corrupted" else [1.0 if at == "clean" else 0.0]
        return job.scores(alphas, method, "both ends" if method == "clean-corrupted" else at)
    if steps != "auto":
        if not isinstance(steps, int) or steps < 1:
            raise MansuError(f'attribution: steps={steps}; EAP-IG needs a whole number from 1 up, or "auto"')
        return job.scores(between(steps, rule), method, rule)
    if not tolerance > 0:
        raise MansuError(f"attribution: tolerance={tolerance}; choose a share above 0, such as 0.02")
    for doubling in range(_DOUBLINGS + 1):
        count = _FIRST_STEPS * 2**doubling
        out = job.scores(between(count, rule), method, rule)
        if out.relative_residual <= tolerance:
            return out
    raise MansuError(
        f"attribution: after {count} steps the residual is still {out.relative_residual:.3g} of the metric's change, "
        f"tolerance={tolerance}; raise the tolerance, use rule='midpoint', or a smoother metric"
    )


class EdgeReader:
    """A model's gradients at every reader of its graph, kept, so that other models' writers can be met with them.

    Takes EAP-IG's passes once; every other model is two forward passes. What is kept are the readers' gradients of all pairs.
    A norm behind the heads (gemma2, gemma3) counts as it is in this model.

    Args:
        model: whose gradients.
        pairs: facts that it knows.
        steps: of EAP-IG.
        batch_size: pairs in a pass, at most.

    Raises:
        MansuError: pairs or a metric that do not fit.
    """

    @torch_defaults()
    def __init__(
        self,
        model: TransformerBridge,
        pairs: PromptPairs,
        *,
        steps: int = 5,
        metric: Metric = logit_difference,
        batch_size: int | None = None,
    ) -> None:
        self.model, self.graph, self.metric = model, Graph.of(model), metric
        self.pairs = prepared(model, pairs, options_read(metric))
        self.job = _Job(model, self.pairs, metric, Ablation(), True, None, None, batch_size, False, False)
        self.cut = plan(model, self.pairs, steps, max_memory=None, batch_size=batch_size)
        self.parts = []
        for piece in by_length(self.pairs.longest, self.cut.pairs, self.cut.pass_tokens):
            batch = self.pairs[piece].trimmed()
            with tqdm(disable=True) as bar:
                _, slopes = _gathered(model, batch, metric, True, between(steps), self.cut, bar)
            self.parts.append((piece, batch, slopes))

    @torch_defaults()
    def read(self, other: TransformerBridge) -> Float[Tensor, "pair writer reader"]:
        """<change of u in another model, gradient at v in this one> for every edge and pair."""
        anatomy, out = Anatomy.of(other), torch.zeros(len(self.pairs), *self.graph.exists.shape)
        contraction = Contraction(self.model, self.graph, self.cut.tokens, self.cut.layers, self.cut.dtype, other)
        for piece, batch, slopes in self.parts:
            path = Path(
                other, batch, self.metric, anatomy.hooks("z", "mlp_out"), {}, last_only=_last_only(anatomy, batch)
            )
            clean, corrupt = (path.recorded(end) for end in (CLEAN, CORRUPT))
            groups, rows = self.job._groups(batch, None)
            changes = _changes(anatomy, batch, clean, corrupt)
            out.index_add_(0, piece[rows[:, 0]], contraction.scores(changes, slopes, groups, len(rows)).cpu())
        return out * self.graph.exists


def _last_only(anatomy: Anatomy, batch: Forced[PromptPairs]) -> str | None:
    """Where the last block's MLP runs at the asked position alone: nothing else of it is measured."""
    return anatomy.hook("mlp_in", anatomy.n_layers - 1) if batch.targets is None else None


@dataclass(frozen=True)
class _Job:
    """What stays the same when the steps are doubled."""

    model: TransformerBridge
    pairs: Forced[PromptPairs]
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
        model, pairs, graph = self.model, self.pairs, Graph.of(self.model)
        share = distributed.share(len(pairs)) if self.data_parallel else slice(0, len(pairs))
        shape = graph.exists.shape
        total = torch.zeros(shape, dtype=torch.float64)
        by_pair = torch.zeros(share.stop - share.start, *shape) if self.per_pair else None
        by_position = torch.zeros(len(self.where.names), *shape, dtype=torch.float64) if self.where else None
        ends = torch.zeros(2, dtype=torch.float64)
        if share.stop > share.start:
            cut = plan(model, pairs[share], len(alphas), max_memory=self.max_memory, batch_size=self.batch_size)
            contraction = Contraction(model, graph, cut.tokens, cut.layers, cut.dtype)
            batches = by_length(pairs.longest[share], cut.pairs, cut.pass_tokens)
            count = len(batches) * len(alphas)
            with tqdm(total=count, desc=f"{method} edges", unit="pass", disable=not self.progress) as bar:
                for piece in batches:
                    of = share.start + piece
                    batch = pairs[of].trimmed()
                    path, slopes = _gathered(
                        model, batch, self.metric, self.ablation.kind == "corrupt", alphas, cut, bar
                    )
                    clean, other = path.ends[CLEAN], path.ends.get(CORRUPT) or self._switched_off(batch)
                    ends += torch.stack([clean.metric.double().sum(), other.metric.double().sum()]).cpu()
                    changes = _changes(Anatomy.of(model), batch, clean, other)
                    del path, clean, other
                    index = None if self.where is None else self.where.of(of)[:, : batch.clean.shape[1]]
                    groups, rows = self._groups(batch, index)
                    parts = contraction.scores(changes, slopes, groups, len(rows)).cpu()
                    total += parts.double().sum(0)
                    if by_pair is not None:
                        by_pair.index_add_(0, piece[rows[:, 0]], parts)
                    if by_position is not None:
                        by_position.index_add_(0, rows[:, 1], parts.double())
        if self.data_parallel:
            total, ends = distributed.summed(total), distributed.summed(ends)
            by_pair = None if by_pair is None else distributed.gathered(by_pair, len(pairs))
            by_position = None if by_position is None else distributed.summed(by_position)
        tensor = total / len(pairs) * graph.exists
        require_finite("edge scores", tensor, model)
        metric_clean, metric_corrupt = (ends / len(pairs)).tolist()
        return EdgeScores(
            tensor=tensor.float(),
            writers=graph.writers,
            readers=graph.readers,
            exists=graph.exists,
            method=method,
            rule=rule,
            steps=len(alphas),
            metric=metric_name(self.metric),
            metric_clean=metric_clean,
            metric_corrupt=metric_corrupt,
            residual=abs(tensor[0].sum().item() - (metric_clean - metric_corrupt)),
            model=fingerprint(model),
            per_pair=None if by_pair is None else by_pair * graph.exists,
            per_position=None if by_position is None else (by_position / len(pairs) * graph.exists).float(),
            positions=() if self.where is None else self.where.names,
        )

    def _switched_off(self, batch: Forced[PromptPairs]) -> End:
        """The end without a run behind it: every writer at its ablated value."""
        recorded, last = self.ablation.activations(self.model, batch), f"mlp_out{Anatomy.of(self.model).n_layers - 1}"
        values = recorded.values | {"embed": recorded.value("stream", 0)}
        if batch.targets is None:
            values[last] = values[last][batch.places.on(values[last].device)][:, None]
        return End(values, measured(self.metric, recorded.logits, batch))

    def _groups(
        self, batch: Forced[PromptPairs], index: Int[Tensor, "run pos"] | None
    ) -> tuple[Int[Tensor, " token"], Int[Tensor, "group 2"]]:
        """The group of every token, and the (pair, position row) behind each group."""
        count, width = batch.clean.shape
        counted = batch.real.cpu()
        pair = batch.owner.cpu()[:, None].expand(count, width) if self.per_pair else torch.zeros(count, width).long()
        row = torch.zeros(count, width).long() if index is None else index.cpu()
        n_rows = 1 if self.where is None else len(self.where.names)
        if self.ablation.kind == "corrupt":
            # In front of the first changed token both runs are the same, so no writer changes there.
            counted &= batch.changed.cpu().cumsum(1) > 0
        groups = torch.where(counted & (row >= 0), pair * n_rows + row, -1).flatten()
        n_pairs = len(batch) if self.per_pair else 1
        return groups, torch.cartesian_prod(torch.arange(n_pairs), torch.arange(n_rows)).reshape(-1, 2)


def _gathered(
    model: TransformerBridge, batch: Forced[PromptPairs], metric: Metric, both: bool, alphas: list[float],
    cut: Plan, bar: tqdm,
) -> tuple[Path, list[Slopes]]:  # fmt: skip
    """Step 1: the path walked, and the readers' gradients summed over its points, or one a point in post-norm families.

    Where answers are one token, only the last token's logits are measured, so the last block's MLP runs at that position
    alone, and the other positions of the final stream are not those of a plain run.
    """
    anatomy = Anatomy.of(model)
    last, final = anatomy.n_layers - 1, anatomy.hook("stream", anatomy.n_layers)
    path = Path(
        model,
        batch,
        metric,
        at_ends=anatomy.hooks("z", "mlp_out"),
        slopes={**anatomy.hooks("q", "k", "v", "mlp_in"), "final": final},
        seen=anatomy.hooks("attn_norm_in", *(("attn_raw",) if anatomy.post_norms else ())),
        both=both,
        last_only=_last_only(anatomy, batch),
        together=cut.together,
    )
    norms = [norm_weights(model, i, "attn") for i in anatomy.layers]
    offsets = [_offsets(model, i, norms[i]) for i in anatomy.layers]
    out: list[Slopes] = []
    steps, weight = 1 if anatomy.post_norms else len(alphas), 1 / len(alphas)
    for number, point in enumerate(path.points(alphas)):
        if not out or anatomy.post_norms:
            raw = [point.values[f"attn_raw{i}"].flatten(0, 1).float() for i in anatomy.layers if anatomy.post_norms]
            final_sum = torch.zeros_like(point.gradients["final"].flatten(0, 1), dtype=torch.float32)
            inputs = [point.values[f"attn_norm_in{i}"] for i in anatomy.layers]
            out.append(Slopes([_empty(anatomy, steps, x, cut.dtype) for x in inputs], final_sum, raw))
        out[-1].final.add_(point.gradients["final"].flatten(0, 1).float(), alpha=weight)
        for i, sums in enumerate(out[-1].layers):
            _add_point(anatomy, sums, i, point, number % steps, weight, norms[i], offsets[i])
            gradient, mlp = point.gradients.pop(f"mlp_in{i}").float(), sums.mlp.unflatten(0, (len(batch.clean), -1))
            if i == last and batch.targets is None:
                mlp[batch.places.on(mlp.device)] += gradient[:, 0] * weight
            else:
                mlp.add_(gradient, alpha=weight)
        point.values.clear()  # else they stay while the next pass runs
        point.gradients.clear()
        bar.update()
    return path, out


def _empty(anatomy: Anatomy, steps: int, like: Float[Tensor, "pair pos d_model"], dtype: torch.dtype) -> LayerSlopes:
    tokens, readers, on = like.shape[0] * like.shape[1], anatomy.n_attention_readers, like.device
    return LayerSlopes(
        ghat=torch.zeros(tokens, readers, anatomy.d_head, device=on),
        slopes=torch.zeros(tokens, steps, readers, device=on),
        xhat=torch.empty(tokens, steps, anatomy.d_model, device=on, dtype=dtype),
        mlp=torch.zeros(tokens, anatomy.d_model, device=on),
    )


def _add_point(
    anatomy: Anatomy, sums: LayerSlopes, layer: int, point: Point, step: int, weight: float,
    norm: NormWeights, offset: Float[Tensor, "reader d_head"],
) -> None:  # fmt: skip
    """One layer's attention at one point."""
    xhat, scale = normalized(point.values.pop(f"attn_norm_in{layer}").flatten(0, 1).float(), norm)
    sums.xhat[:, step] = xhat
    inverse = weight / scale
    start = 0
    for r, heads in anatomy.heads_of.items():
        value, grad = (
            part.pop(f"{r}{layer}").reshape(-1, heads, anatomy.d_head).float()
            for part in (point.values, point.gradients)
        )
        where = slice(start, start + heads)
        sums.ghat[:, where].addcmul_(grad, inverse[:, None, None])
        slope = torch.linalg.vecdot(value - offset[where], grad)
        sums.slopes[:, step, where] = slope * (inverse / anatomy.d_model)[:, None]
        start += heads


def _offsets(model: TransformerBridge, layer: int, norm: NormWeights) -> Float[Tensor, "reader d_head"]:
    """Each projection's bias, the norm's included."""
    parts, weights = [], attention_weights(model, layer)
    for name in "qkv":
        matrix, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
        offset = torch.zeros(matrix.shape[:2], device=matrix.device) if bias is None else bias.float()
        parts.append(offset if norm.bias is None else offset + matrix.float() @ norm.bias.float())
    return torch.cat(parts)


def _changes(anatomy: Anatomy, batch: Forced[PromptPairs], clean: End, other: End) -> Changes:
    """Step 2."""

    def change(key: str) -> Tensor:
        # Taken out of both ends, so that each is freed as its change is made.
        return (clean.values.pop(key) - other.values.pop(key)).flatten(0, 1)

    def of_heads(key: str) -> Tensor:
        a, b = (heads_last(end.values.pop(key), anatomy.n_heads) for end in (clean, other))
        return (a - b).flatten(0, 1)

    mlp_out = [change(f"mlp_out{i}") for i in anatomy.layers]
    if batch.targets is None:
        at_all = torch.zeros(*batch.clean.shape, anatomy.d_model, device=mlp_out[-1].device)
        at_all[batch.places.on(at_all.device)] = mlp_out[-1].float()
        mlp_out[-1] = at_all.flatten(0, 1)
    return Changes(embed=change("embed"), z=[of_heads(f"z{i}") for i in anatomy.layers], mlp_out=mlp_out)
