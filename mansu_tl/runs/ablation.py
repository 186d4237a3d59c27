"""What a component carries when it is switched off: its value on the corrupt prompt, zero, or a mean over other prompts.

Zero and mean ablation are runs in which every writer's value is put in its place: the streams that readers see are what
the model makes of those. What is switched off of `embed` is the token's embedding; a learned positional embedding (gpt2)
stays where it is, as in EAP-IG's code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs, Sequences
from mansu_tl.data.fit import require_fit, require_sequences
from mansu_tl.data.forced import Forced, forced
from mansu_tl.data.masks import real_tokens
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.models.kinds import require_bridge
from mansu_tl.models.state import computing_dtype, home, require_ready
from mansu_tl.results.result import Result
from mansu_tl.runs.ends import end_hooks, positional
from mansu_tl.runs.passes import Hook, Recording, record

KINDS = ("corrupt", "zero", "mean")


@dataclass(frozen=True)
class Ablation(Result):
    """What switched-off components carry.

    Attributes:
        kind: "corrupt" (the pair's own counterfactual), "zero" or "mean".
        means: for "mean", what every writer carries, by `Anatomy.hooks`'s names ("stream0" is the embedding), with one row
            (all positions alike) or one row a position.
    """

    kind: str = "corrupt"
    means: Mapping[str, Float[Tensor, "pos d"]] | None = None

    def __repr__(self) -> str:
        return f"Ablation({self.kind})"

    def activations(self, model: TransformerBridge, pairs: PromptPairs | Forced[PromptPairs]) -> Recording:
        """The ablated run of some pairs: every writer at its ablated value, the streams and logits that follow.

        Raises:
            MansuError: pairs longer than the positions that the means were taken over.
        """
        pairs = pairs if isinstance(pairs, Forced) else forced(pairs)
        if self.kind == "corrupt":
            return record(model, pairs.corrupt, pairs.places, end_hooks(model, pairs, clean=False))
        anatomy, width = Anatomy.of(model), pairs.clean.shape[1]
        hooks: list[Hook] = []
        for key, point in _points(anatomy).items():
            value = torch.zeros(1, 1, dtype=computing_dtype(model)) if self.means is None else self.means[key]
            if 1 < len(value) < width:
                raise MansuError(
                    f"ablation: pairs have {width} positions, the means were taken over {len(value)}; use longer reference "
                    "prompts, or per_position=False"
                )
            value = value[:width].to(home(model))
            hooks.append((point, _everywhere(value + positional(model, width) if key == "stream0" else value)))
        return record(model, pairs.clean, pairs.places, hooks)


@torch_defaults()
def ablation(
    model: TransformerBridge,
    kind: str = "corrupt",
    *,
    reference: Sequences | PromptPairs | None = None,
    per_position: bool = False,
    batch_size: int = 64,
) -> Ablation:
    """How to switch components off, by name.

    Args:
        kind: "corrupt", "zero" or "mean".
        reference: what "mean" averages over: sequences, or the clean prompts of some pairs. Real tokens only.
        per_position: average every position by itself instead of all together.

    Raises:
        MansuError: an unknown kind, "mean" without a reference, or a reference that another kind does not use.
    """
    if kind not in KINDS:
        raise MansuError(f"ablation: unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    if kind != "mean":
        if reference is not None:
            raise MansuError(f"ablation: {kind!r} uses no reference; drop it, or choose 'mean'")
        return Ablation(kind)
    if reference is not None and not isinstance(reference, PromptPairs):
        require_sequences(reference)
    if reference is None or len(reference) == 0:
        raise MansuError("ablation: 'mean' needs a reference to average over; pass reference=sequences or pairs")
    require_bridge(model)
    require_fit(model, reference)
    reference = reference.to(home(model))
    tokens = reference.clean if isinstance(reference, PromptPairs) else reference.tokens
    require_ready(model, tokens)
    sums: dict[str, Tensor] = {}
    seen = torch.zeros(tokens.shape[1], device=tokens.device, dtype=torch.float64)
    for start in range(0, tokens.shape[0], batch_size):
        rows, lengths = tokens[start : start + batch_size], reference.lengths[start : start + batch_size]
        real = real_tokens(rows, lengths)
        seen += real.sum(0)
        recorded = record(model, rows, lengths).values
        recorded["stream0"] = recorded["stream0"] - positional(model, tokens.shape[1])
        for key in _points(Anatomy.of(model)):
            value = recorded[key].flatten(2).double()
            part = torch.einsum("bp,bpd->pd", real.double().to(value.device), value)
            sums[key] = sums[key] + part if key in sums else part
    seen = seen.cpu()
    reached = int((seen > 0).sum())
    means = {
        key: (s.cpu() / seen[:, None])[:reached] if per_position else s.cpu().sum(0, keepdim=True) / seen.sum()
        for key, s in sums.items()
    }
    return Ablation("mean", {key: value.to(computing_dtype(model)) for key, value in means.items()})


def _points(anatomy: Anatomy) -> dict[str, str]:
    """The hook points of what the writers write."""
    return {"stream0": anatomy.hook("stream", 0), **anatomy.hooks("z", "mlp_out")}


def _everywhere(value: Float[Tensor, "pos d"]) -> Callable[..., Tensor]:
    """A hook that hands a value on for every pair, at every position where there is one row for all.

    As a tensor of its own: a layer behind it may look at its numbers in another shape.
    """
    return lambda seen, hook: value.to(seen.device).expand_as(seen.flatten(2)).reshape(seen.shape).contiguous()
