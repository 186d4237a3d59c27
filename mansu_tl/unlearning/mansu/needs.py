"""What MANSU needs of a model and a task, known before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.errors import MansuError
from mansu_tl.models import LinearWeight, linear_weights
from mansu_tl.quantization import grid_of
from mansu_tl.unlearning.mansu.settings import MansuSettings


def mansu_needs(model: TransformerBridge, task: Task, settings: MansuSettings) -> Iterator[tuple[str, str]]:
    """What will stop a run ("wrong"), or may ("warning"), and the way out."""
    linear = linear_weights(model)
    for require in (
        lambda: [grid_of(name) for name in settings.quantizers],
        lambda: budget_of(linear, settings),
        lambda: require_defended(task, settings),
    ):
        try:
            require()
        except MansuError as error:
            yield "wrong", str(error)
    rows = zip(task.unseen.tokens.tolist(), task.unseen.lengths.tolist(), strict=True)
    if settings.representation_weight and len({tuple(row[:length]) for row, length in rows}) == 1:
        yield (
            "wrong",
            "unseen: one never-seen prompt has no spread to measure distances in; give two, or representation_weight=0",
        )
    tokens, widths = int(task.retain_text.lengths.sum()), [weight.in_features for weight in linear.values()]
    if (settings.null_space or settings.projector) and tokens < max(widths):
        yield (
            "wrong" if tokens < min(widths) else "warning",
            f"retain text: {tokens} tokens, the widest matrix has {max(widths)} inputs; give at least as many tokens, or "
            "switch the null space off (null_space=0, projector=False)",
        )


def budget_of(linear: Mapping[str, LinearWeight], settings: MansuSettings) -> int:
    """How many weights may be edited; refused where it is none."""
    total = sum(weight.in_features * weight.out_features for weight in linear.values())
    budget = int(settings.budget * total)
    if budget < 1:
        raise MansuError(f"mansu: budget={settings.budget} of {total} weights leaves nothing to edit; raise it")
    return budget


def require_defended(task: Task, settings: MansuSettings) -> Int[Tensor, " pair"]:
    """The fact of every forget pair, as a number; refused where the attacker in the loop leaves none to defend."""
    facts: torch.Tensor = task.forget_pairs.fact_numbers()
    known = int(facts.max()) + 1
    if settings.adversary_weight and attackers_facts(facts, settings) >= known:
        raise MansuError(
            f"mansu: adversary_facts={settings.adversary_facts} of {known} forget facts leaves none to defend; lower it, "
            "or switch the attacker off with adversary_weight=0"
        )
    return facts


def attackers_facts(facts: Int[Tensor, " pair"], settings: MansuSettings) -> int:
    """How many facts the attacker in the loop trains on: as set, or a quarter of them."""
    return settings.adversary_facts or max(1, (int(facts.max()) + 1) // 4)
