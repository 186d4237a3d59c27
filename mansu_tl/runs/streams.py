"""The residual stream of every layer, as probes, depth and damage read it; and whether two models have the same."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Sequences
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, home
from mansu_tl.runs.passes import Hook, forward, keep, run


def stream_hooks(model: TransformerBridge) -> dict[str, str]:
    """Where each layer's stream is seen: "embed" enters block 0, "L0", "L1", ... leave a block."""
    anatomy = Anatomy.of(model)
    return dict(zip(("embed", *(f"L{i}" for i in anatomy.layers)), anatomy.hooks("stream").values(), strict=True))


@torch.no_grad()
def residual_streams(
    model: TransformerBridge, rows: Sequences, *, every_logit: bool = False
) -> tuple[list[Float[Tensor, "row pos d_model"]], Float[Tensor, "*position vocab"]]:
    """The streams, layer by layer, and the logits at each row's last token, or with `every_logit` at all of them."""
    kept: dict[str, Tensor] = {}
    rows = rows.to(home(model))
    hooks: list[Hook] = [(hook, keep(kept, layer)) for layer, hook in stream_hooks(model).items()]
    if every_logit:
        logits = forward(model, rows.tokens, hooks)
    else:
        logits = run(model, rows.tokens, rows.lengths, hooks)
    return [kept[layer] for layer in stream_hooks(model)], logits


def require_one_shape(what: str, original: TransformerBridge, **others: TransformerBridge) -> None:
    """Refuse models of different shape.

    Raises:
        MansuError: another number of layers, width or vocabulary than the original's.
    """
    for name, other in others.items():
        shape, wanted = ((m.cfg.n_layers, m.cfg.d_model, m.cfg.d_vocab) for m in (other, original))
        if shape != wanted:
            raise MansuError(
                f"{what}: the {name} model has {shape[0]} layers of width {shape[1]}, the original {wanted[0]} of "
                f"{wanted[1]} (vocabularies {shape[2]} and {wanted[2]}); compare models of one shape"
            )
