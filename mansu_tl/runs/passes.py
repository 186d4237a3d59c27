"""Forward passes with hooks: what every patching and attribution method in this package is built from.

Works on the hook points that a `TransformerBridge` has without any flag: `blocks.l.hook_in`, `attn.q/k/v.hook_out`
(a head's slice of the projection's output, before any q/k norm and rotary embedding), `attn.o.hook_in` (z),
`ln2.hook_in` (reaches the MLP branch only, not the skip path), `mlp.hook_out`, `ln_final.hook_in`, `unembed.hook_in`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs
from mansu_tl.data.fit import require_fit, require_pairs
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.models.kinds import require_bridge
from mansu_tl.models.state import computing_dtype, home, require_ready
from mansu_tl.runs.metrics import Metric

Hook = tuple[str, Callable[..., Tensor | None]]


@dataclass(frozen=True)
class Activations:
    """What the writers wrote and the readers saw in one forward pass, per layer where it says so.

    Attributes:
        embed: the residual stream entering block 0.
        resid_pre: per layer, the stream that attention reads.
        mlp_in: per layer, the stream that the MLP reads.
        z: per layer, the heads' outputs before the output projection.
        attn_raw: per layer, attention output before a post-norm (families with post-norms only, else empty).
        mlp_out: per layer, what the MLP adds to the stream (after a post-norm, where there is one).
        final: the stream that the final norm reads.
        logits: at the last real token.
    """

    embed: Float[Tensor, "pair pos d_model"]
    resid_pre: tuple[Float[Tensor, "pair pos d_model"], ...]
    mlp_in: tuple[Float[Tensor, "pair pos d_model"], ...]
    z: tuple[Float[Tensor, "pair pos head d_head"], ...]
    attn_raw: tuple[Float[Tensor, "pair pos d_model"], ...]
    mlp_out: tuple[Float[Tensor, "pair pos d_model"], ...]
    final: Float[Tensor, "pair pos d_model"]
    logits: Float[Tensor, "pair vocab"]


def run(
    model: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    lengths: Int[Tensor, " row"],
    hooks: list[Hook] | None = None,
) -> Float[Tensor, "row vocab"]:
    """Logits at the last real token, with `hooks` in place; only that position is unembedded."""
    last = lengths - 1
    rows = torch.arange(tokens.shape[0], device=tokens.device)

    def cut(stream: Tensor, hook: object) -> Tensor:
        # Contiguous on purpose: a strided slice turns the unembedding into one product per row.
        return stream[rows.to(stream.device), last.to(stream.device)][:, None].contiguous()

    with model.hooks(fwd_hooks=[*(hooks or []), ("unembed.hook_in", cut)]):
        return model(tokens, return_type="logits")[:, 0].to(tokens.device)


@torch.no_grad()
def record(model: TransformerBridge, tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"]) -> Activations:
    """One plain forward pass, keeping what every writer wrote and every reader read."""
    anatomy = Anatomy.of(model)
    kept: dict[str, Tensor] = {}
    names = {"embed": "blocks.0.hook_in", "final": "ln_final.hook_in"}
    for layer in range(anatomy.n_layers):
        names[f"pre{layer}"] = f"blocks.{layer}.ln1.hook_in"
        names[f"mid{layer}"] = f"blocks.{layer}.ln2.hook_in"
        names[f"z{layer}"] = f"blocks.{layer}.attn.o.hook_in"
        names[f"out{layer}"] = (
            f"blocks.{layer}.ln2_post.hook_out" if anatomy.post_norms else f"blocks.{layer}.mlp.hook_out"
        )
        if anatomy.post_norms:
            names[f"raw{layer}"] = f"blocks.{layer}.ln1_post.hook_in"
    logits = run(model, tokens, lengths, [(hook, keep(kept, key)) for key, hook in names.items()])
    per = range(anatomy.n_layers)
    return Activations(
        embed=kept["embed"],
        resid_pre=tuple(kept[f"pre{i}"] for i in per),
        mlp_in=tuple(kept[f"mid{i}"] for i in per),
        z=tuple(heads_last(kept[f"z{i}"], anatomy.n_heads) for i in per),
        attn_raw=tuple(kept[f"raw{i}"] for i in per) if anatomy.post_norms else (),
        mlp_out=tuple(kept[f"out{i}"] for i in per),
        final=kept["final"],
        logits=logits.float(),
    )


def keep(store: dict[str, Tensor], key: str) -> Callable[..., Tensor]:
    """A hook that stores the tensor it sees under `key` and hands it on.

    It returns the tensor because a hook point may show a reshaped view: only what is returned stays in the graph.
    """

    def hook(tensor: Tensor, hook: object) -> Tensor:
        store[key] = tensor
        return tensor

    return hook


def heads_last(z: Tensor, n_heads: int) -> Float[Tensor, "pair pos head d_head"]:
    """z with its heads as an axis of their own, whether or not the hook already gives it that way."""
    return z if z.ndim == 4 else z.unflatten(-1, (n_heads, -1))


def prepared(model: TransformerBridge, pairs: PromptPairs) -> PromptPairs:
    """The pairs on the model's device, once both are known to give right scores.

    Raises:
        MansuError: as `check`, or a model that `require_ready` refuses.
    """
    check(model, pairs)
    require_ready(model, pairs.clean)
    return pairs.to(home(model))


def check(model: TransformerBridge, pairs: PromptPairs) -> None:
    """Refuse pairs that would give wrong scores silently.

    Raises:
        MansuError: no hooked model or no pairs, tokens that the model has no embedding for, or prompts longer than it has
            positions.
    """
    require_bridge(model)
    require_pairs(pairs)
    require_fit(model, pairs)


def measured(metric: Metric, logits: Float[Tensor, "pair vocab"], pairs: PromptPairs) -> Float[Tensor, " pair"]:
    """The metric of each pair, checked.

    Raises:
        MansuError: it has the wrong shape, is not finite, or does not depend on the logits.
    """
    name = metric_name(metric)
    values = metric(logits, pairs)
    if values.shape != (len(pairs),):
        raise MansuError(
            f"metric {name!r} gave shape {tuple(values.shape)} for {len(pairs)} pairs; return one number per pair"
        )
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise MansuError(f"metric {name!r} is {values[bad].item()} for pair {bad}; check the weights and the metric")
    if logits.requires_grad and not values.requires_grad:
        raise MansuError(f"metric {name!r} does not depend on the logits; compute it from its first argument")
    return values


def require_finite(what: str, values: Float[Tensor, "*any"], model: TransformerBridge) -> None:
    """Refuse a result that is no number.

    Raises:
        MansuError: some of it is NaN or infinite.
    """
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise MansuError(
            f"{what}: {bad} of {values.numel()} are not finite, so activations or gradients overflow in "
            f"{computing_dtype(model)}; load the model with dtype=torch.float32"
        )


def metric_name(metric: Metric) -> str:
    """How the metric is called in results."""
    return getattr(metric, "__name__", type(metric).__name__)


def chunks(pairs: PromptPairs, batch_size: int) -> Iterator[tuple[slice, PromptPairs]]:
    """The pairs in batches, with the slice that each one covers."""
    for start in range(0, len(pairs), batch_size):
        where = slice(start, min(start + batch_size, len(pairs)))
        yield where, pairs[where]
