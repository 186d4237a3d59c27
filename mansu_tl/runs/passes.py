"""Forward passes with hooks: what every patching and attribution method in this package is built from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs
from mansu_tl.data.fit import require_fit, require_pairs
from mansu_tl.data.forced import Asked, Forced, forced, places_of
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.models.anatomy import UNEMBED
from mansu_tl.models.kinds import require_bridge
from mansu_tl.models.state import computing_dtype, home, require_ready

P = TypeVar("P", PromptPairs, Forced[PromptPairs])
Hook = tuple[str, Callable[..., Tensor | None]]


@dataclass(frozen=True)
class Recording:
    """One forward pass.

    Attributes:
        values: what had each role in each layer, by `Anatomy.hooks`'s names ("stream0", "z3"); z head by head.
        logits: at the asked positions.
    """

    values: dict[str, Tensor]
    logits: Float[Tensor, "place vocab"]

    def value(self, role: str, layer: int) -> Float[Tensor, ...]:
        """What had a role in a layer."""
        return self.values[f"{role}{layer}"]


def run(
    model: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    asked: Asked,
    hooks: list[Hook] | None = None,
) -> Float[Tensor, "place vocab"]:
    """Logits at some positions, of rows' lengths the last ones, with `hooks` in place; only these are unembedded."""
    return forward(model, tokens, [*(hooks or []), (UNEMBED, only(asked))])[:, 0].to(tokens.device)


def forward(
    model: TransformerBridge, tokens: Int[Tensor, "row pos"], hooks: Sequence[Hook], **given: Any
) -> Float[Tensor, "row2 pos2 vocab"]:
    """The logits of a pass with `hooks` in place, one after another where several share a point.

    Args:
        given: further arguments of the model's own forward.
    """
    with model.hooks(fwd_hooks=list(hooks)):
        logits: Tensor = model(tokens, return_type="logits", **given)
    return logits


@torch.no_grad()
def record(
    model: TransformerBridge, tokens: Int[Tensor, "row pos"], asked: Asked, hooks: Sequence[Hook] = ()
) -> Recording:
    """One forward pass with `hooks` in place, keeping what every writer wrote and every reader read."""
    anatomy = Anatomy.of(model)
    values: dict[str, Tensor] = {}
    points = anatomy.hooks("stream", "mlp_in", "z", "mlp_out", *(("attn_raw",) if anatomy.post_norms else ()))
    logits = run(model, tokens, asked, [*hooks, *((point, keep(values, key)) for key, point in points.items())])
    for i in anatomy.layers:
        values[f"z{i}"] = heads_last(values[f"z{i}"], anatomy.n_heads)
    return Recording(values, logits.float())


def keep(store: dict[str, Tensor], key: str, made: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """A hook that stores the tensor it sees, or what `made` (a hook too) makes of it, and hands that on.

    It returns the tensor because a hook point may show a reshaped view: only what is returned stays in the graph.
    """

    def hook_fn(tensor: Tensor, hook: object) -> Tensor:
        store[key] = tensor if made is None else made(tensor, hook)
        return store[key]

    return hook_fn


def put(value: Tensor) -> Callable[..., Tensor]:
    """A hook that hands this on, whatever it sees."""
    return lambda tensor, hook: value


def only(asked: Asked) -> Callable[..., Tensor]:
    """A hook that hands on some positions alone, of rows' lengths the last ones, each as a row of one position."""
    places = places_of(asked)

    def cut(stream: Tensor, hook: object) -> Tensor:
        # Contiguous on purpose: a strided slice turns the unembedding into one product per row.
        return stream[places.on(stream.device)][:, None].contiguous()

    return cut


def last_token_only(model: Any, asked: Asked) -> RemovableHandle:
    """A hook under which a plain HF model unembeds some positions alone (see `only`); to be used in a `with`."""
    cut = only(asked)
    return model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (cut(inputs[0], None),))


def heads_last(z: Tensor, n_heads: int) -> Float[Tensor, "pair pos head d_head"]:
    """z with its heads as an axis of their own, whether or not the hook already gives it that way."""
    return z if z.ndim == 4 else z.unflatten(-1, (n_heads, -1))


def prepared(model: TransformerBridge, pairs: PromptPairs, options: int | None) -> Forced[PromptPairs]:
    """The pairs as they are run, on the model's device, once both are known to give right scores.

    Args:
        options: how many of them are read, the answer first; None = all.
    """
    check(model, pairs)
    require_ready(model, pairs.clean)
    return forced(pairs.to(home(model)), options)


def check(model: TransformerBridge, pairs: PromptPairs) -> None:
    """Refuse pairs that would give wrong scores silently."""
    require_bridge(model)
    require_pairs(pairs)
    require_fit(model, pairs)


def require_finite(what: str, values: Float[Tensor, "*any"], model: TransformerBridge) -> None:
    """Refuse a result that is no number."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise MansuError(
            f"{what}: {bad} of {values.numel()} are not finite, so activations or gradients overflow in "
            f"{computing_dtype(model)}; load the model with dtype=torch.float32"
        )


def chunks(pairs: P, batch_size: int) -> Iterator[tuple[slice, P]]:
    """The pairs in batches, with the slice that each one covers."""
    for start in range(0, len(pairs), batch_size):
        where = slice(start, min(start + batch_size, len(pairs)))
        yield where, pairs[where]


def by_length(lengths: Int[Tensor, " item"], most: int, pass_tokens: float) -> list[Int[Tensor, " _"]]:
    """Items in batches, the shortest first, cut so that padding and passes together cost least.

    Args:
        most: items in a batch.
        pass_tokens: how many tokens cost what a pass costs whatever is in it.
    """
    order = lengths.cpu().argsort(stable=True)
    ordered = lengths.cpu()[order].tolist()
    # The least cost of the first n items, and where their last batch begins.
    least, start = [0.0], [0]
    for stop, width in enumerate(ordered, 1):
        costs = [(least[i] + (stop - i) * width + pass_tokens, i) for i in range(max(0, stop - most), stop)]
        cost, first = min(costs)
        least.append(cost)
        start.append(first)
    batches, stop = [], len(ordered)
    while stop:
        batches.append(order[start[stop] : stop].sort().values)
        stop = start[stop]
    return batches[::-1]
