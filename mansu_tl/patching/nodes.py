"""Attribution patching of nodes: one backward pass instead of one intervention a node.

AtP (Nanda 2023) multiplies a node's change with the metric's gradient there. Through a saturated softmax that gradient
says little about queries and keys; AtP* (Kramar et al. 2024, arXiv 2403.00745, section 3.1) computes the attention
pattern that a patched query or key gives exactly, and multiplies its change with the gradient at the pattern.
"""

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
from mansu_tl.data.forced import Forced
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.patching.patterns import pattern_effects
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import Metric, logit_difference, metric_name, options_read
from mansu_tl.runs.passes import chunks, heads_last, prepared, require_finite
from mansu_tl.runs.points import CLEAN, CORRUPT, Path, between

# Runs that share a batch when keys are patched one position at a time.
_COPIES = 8


@dataclass(frozen=True)
class NodeScores(Result):
    """First-order effect of restoring each node.

    Attributes:
        tensor: mean over pairs of (a(clean) - a(corrupt)) . dm/da, summed over positions; positive = supports the answer.
        writers: names: the writers, and after them (where asked for) per layer the heads' `L0H0.q` and the KV heads'
            `L0KV0.k` and `L0KV0.v`, each the projection's output.
        at: where the gradient was taken: "clean", "corrupt", or "path" (averaged between them).
        metric: name of the metric.
        qk_fix: whether queries and keys went through the exact softmax.
        per_pair: the scores of every pair, kept on request.
        per_position: mean over pairs of the scores by position, kept on request. With the QK fix a key is patched one
            position at a time here and at all positions at once in `tensor`, so these rows need not add up to it.
        positions: names of the rows of `per_position`.
    """

    tensor: Float[Tensor, " node"]
    writers: tuple[str, ...]
    at: str
    metric: str
    qk_fix: bool = False
    per_pair: Float[Tensor, "pair node"] | None = None
    per_position: Float[Tensor, "pos node"] | None = None
    positions: tuple[str, ...] = ()

    def __getitem__(self, node: str) -> float:
        """The score of one node, by name."""
        if node not in self.writers:
            raise MansuError(f"node {node!r}: not in these scores; they hold {', '.join(self.writers[:3])}, ...")
        return self.tensor[self.writers.index(node)].item()

    def to_dataframe(self) -> pd.DataFrame:
        """One row a node, in order of computation."""
        return pd.DataFrame({"writer": self.writers, "score": self.tensor.tolist()})

    def __repr__(self) -> str:
        how = f"at the {self.at}" + (", QK fix" if self.qk_fix else "")
        return f"NodeScores({len(self.writers)} nodes, gradient {how}, {self.metric})"

    def _tables(self) -> Sequence[Table]:
        frame = self.to_dataframe().sort_values("score", key=abs, ascending=False, kind="stable")
        return (Table(frame, "largest |score| first", "{:.4f}".format, rows=10),)


@torch_defaults()
def node_attribution(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    at: str = "clean",
    steps: int | None = None,
    qkv: bool = False,
    qk_fix: bool = False,
    metric: Metric = logit_difference,
    per_pair: bool = False,
    per_position: bool | str = False,
    batch_size: int = 64,
    progress: bool = False,
) -> NodeScores:
    """Attribution patching of every writer, from gradients at the writers' own outputs (not at edges).

    A node's score equals the sum of its outgoing EAP edge scores taken at the same end (in families with post-norms
    this holds for `embed` and MLPs: a head's gradient is taken in front of the post-norm).

    Args:
        at: the end at which the gradient is taken.
        steps: average the gradient over so many embeddings between the ends instead (midpoint rule).
        qkv: also score queries, keys and values.
        qk_fix: score queries and keys through the exact softmax (AtP*); implies `qkv`.
        per_pair: also keep the scores of every pair.
        per_position: also keep the scores by position: True or "start", "end", "span" (see `positions`).

    Raises:
        MansuError: an unknown end, fewer than one step, or the QK fix together with steps.
    """
    if at not in ("clean", "corrupt"):
        raise MansuError(f"attribution: unknown end {at!r}; choose at='clean' or at='corrupt'")
    if steps is not None and steps < 1:
        raise MansuError(f"attribution: steps={steps}; choose at least one, or None for one end")
    if steps is not None and qk_fix:
        raise MansuError("attribution: the QK fix is defined at one end; drop steps, or drop qk_fix")
    run = prepared(model, pairs, options_read(metric))
    anatomy = Anatomy.of(model)
    names = _names(anatomy, qkv or qk_fix)
    where = positions(run, "start" if per_position is True else per_position) if per_position else None
    by_pair = torch.zeros(len(pairs), len(names), dtype=torch.float64)
    by_position = None if where is None else torch.zeros(len(where.names), len(names), dtype=torch.float64)
    alphas = [CLEAN if at == "clean" else CORRUPT] if steps is None else between(steps)
    for piece, chunk in tqdm(list(chunks(run, batch_size)), desc="node scores", unit="batch", disable=not progress):
        token, joint = _scores(model, chunk, metric, alphas, qkv or qk_fix, qk_fix, where is not None)
        by_pair[piece] = chunk.by_pair(joint.double()).cpu()
        if where is not None and by_position is not None:
            where.add(by_position, piece, token)
    require_finite("node scores", by_pair, model)
    return NodeScores(
        tensor=by_pair.mean(0).float(),
        writers=names,
        at=at if steps is None else "path",
        metric=metric_name(metric),
        qk_fix=qk_fix,
        per_pair=by_pair.float() if per_pair else None,
        per_position=None if by_position is None else (by_position / len(pairs)).float(),
        positions=() if where is None else where.names,
    )


def _names(anatomy: Anatomy, qkv: bool) -> tuple[str, ...]:
    return anatomy.writers + (tuple(r for r in anatomy.readers if r.rsplit(".", 1)[-1] in "qkv") if qkv else ())


def _scores(
    model: TransformerBridge,
    pairs: Forced[PromptPairs],
    metric: Metric,
    alphas: list[float],
    qkv: bool,
    qk_fix: bool,
    by_token: bool,
) -> tuple[Float[Tensor, "run pos node"], Float[Tensor, "run node"]]:
    """The scores token by token, and those of patching all tokens at once (the same but for fixed keys)."""
    anatomy = Anatomy.of(model)
    hooks = anatomy.hooks("z", "mlp_out", *("qkv" if qkv else ""), *(("pattern",) if qk_fix else ()))
    seen = hooks | (anatomy.hooks("stream") if qk_fix else {})
    path = Path(model, pairs, metric, at_ends=seen, slopes={"embed": anatomy.hook("stream", 0), **hooks})
    grads = path.mean_gradients(alphas)
    ends = [path.ends[end].values for end in (CORRUPT, CLEAN)]

    def effect(key: str, count: int = 1) -> Float[Tensor, "run pos node"]:
        change = ends[1][key].float() - ends[0][key].float()
        return (heads_last(grads[key], count) * heads_last(change, count)).sum(-1).to(pairs.clean.device)

    parts = [effect("embed")]
    for i in anatomy.layers:
        parts += [effect(f"z{i}", anatomy.n_heads), effect(f"mlp_out{i}")]
    counts = anatomy.heads_of if qkv else {}
    per_layer = {f"{r}{i}": effect(f"{r}{i}", count) for i in anatomy.layers for r, count in counts.items()}
    joint = {key: value.sum(1) for key, value in per_layer.items()}
    if qk_fix:
        end = int(alphas[0])
        base, other = ends[end], ends[1 - end]
        sign = 1.0 if end == 0 else -1.0  # patching the clean run with corrupt values takes the effect away
        tokens = pairs.clean if end else pairs.corrupt
        for r in "qk":
            for i, fixed in enumerate(pattern_effects(model, tokens, base, other, grads, r, [slice(None)])):
                every = sign * fixed[0].to(pairs.clean.device)
                joint[f"{r}{i}"] = every.sum(1)
                if r == "q":
                    per_layer[f"q{i}"] = every
        for start in range(0, tokens.shape[1] if by_token else 0, _COPIES):
            stop = min(start + _COPIES, tokens.shape[1])
            places = [slice(place, place + 1) for place in range(start, stop)]
            for i, fixed in enumerate(pattern_effects(model, tokens, base, other, grads, "k", places)):
                per_layer[f"k{i}"][:, start:stop] = sign * fixed.sum(2).transpose(0, 1).to(pairs.clean.device)
    order = [f"{r}{i}" for i in anatomy.layers for r in "qkv"] if qkv else []
    token = torch.cat([*parts, *(per_layer[key] for key in order)], -1)
    return token, torch.cat([*(p.sum(1) for p in parts), *(joint[key] for key in order)], -1)
