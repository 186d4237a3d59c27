"""An attacker inside the loop: what a few steps of fine-tuning on some forget facts would change.

First order, after tamper-resistant training (Tamirisa et al. 2024, arXiv 2408.00761): the attack's change of the weights
is held fixed, and the forget loss on the facts that it did not train on is taken at the attacked weights. An attacker who is
always the same is one that an edit can hide from, so his facts, steps and rate can be drawn, and his kind: whether he trains
the weights or adapters in their place, and whether he has forget facts or only near text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mansu_tl.data import PromptPairs, Sequences
from mansu_tl.data.forced import forced
from mansu_tl.models.low_rank import low_rank_factors, with_adapters
from mansu_tl.runs.values import Values, last_token_logits
from mansu_tl.unlearning.mansu.settings import MansuSettings
from mansu_tl.unlearning.retain_statistics import sequence_loss

# Adapters are trained ten times as fast as the weights would be; their product is scaled by alpha over their rank.
_FASTER, _ALPHA, _RANK = 10.0, 16.0, 8


@dataclass(frozen=True)
class Attacked:
    """One attack."""

    change: dict[str, Tensor]  # by parameter
    others: Int[Tensor, " row"]  # pairs about the facts that it did not train on; of near text alone, all of them


@dataclass(frozen=True)
class Means:
    """What an attacker has: how many facts to train on, for how many steps, at what learning rate, and his kind."""

    facts: int  # 0 = near text alone
    steps: int
    rate: float
    kind: str = "weights"

    @classmethod
    def drawn(cls, settings: MansuSettings, known: int, spread: float, generator: torch.Generator) -> Means:
        """Those of the settings, each times a factor between 1 / spread and spread, even in the logarithm.

        Args:
            known: how many forget facts there are; one at least stays to be defended.
            spread: 1 draws none of the three.
        """
        facts, steps, rate = settings.attacked_facts(known), settings.adversary_steps, settings.adversary_rate
        if spread != 1:
            more, longer, faster = (spread ** (2 * torch.rand(3, generator=generator) - 1)).tolist()
            facts = min(known - 1, max(1, round(more * facts)))
            steps, rate = max(1, round(longer * steps)), faster * rate
        kinds = settings.attackers
        # Where there is one kind nothing is drawn.
        kind = kinds[int(torch.randint(len(kinds), (1,), generator=generator))] if len(kinds) > 1 else kinds[0]
        return cls(0 if kind == "near" else facts, steps, rate * (_FASTER if kind == "adapters" else 1), kind)


def attacked(
    model: PreTrainedModel,
    values: Values,
    names: tuple[str, ...],
    pairs: PromptPairs,
    facts: Int[Tensor, " pair"],
    settings: MansuSettings,
    generator: torch.Generator,
    near: Sequences,
    spread: float = 1.0,
) -> Attacked:
    """Fine-tune the matrices of some names, from `values` on, on the pairs about a few random facts, or near text, with Adam.

    Args:
        near: what an attacker of kind "near" has.
        spread: as in `Means.drawn`.
    """
    means = Means.drawn(settings, int(facts.max()) + 1, spread, generator)
    every = torch.randperm(int(facts.max()) + 1, generator=generator)
    known = torch.isin(facts.cpu(), every[: means.facts])
    rows, others = known.nonzero()[:, 0], (~known).nonzero()[:, 0]
    start = {name: values[name].detach().float() for name in names}
    rest = {name: value.detach() for name, value in values.items() if name not in start}
    trained: dict[str, tuple[Tensor, ...]] = {name: (value.clone(),) for name, value in start.items()}
    if means.kind == "adapters":
        draw = int(torch.randint(2**31, (1,), generator=generator))
        trained = dict(low_rank_factors(start, names, _RANK, draw))
    flat = [each.requires_grad_() for pair in trained.values() for each in pair]

    def moved() -> dict[str, Tensor]:
        if means.kind == "adapters":
            return with_adapters(start, {name: (pair[0], pair[1]) for name, pair in trained.items()}, _ALPHA / _RANK)
        return {name: pair[0] for name, pair in trained.items()}

    optimizer = torch.optim.Adam(flat, lr=means.rate)
    for _ in range(means.steps):
        there = {**rest, **moved()}
        if means.kind == "near":
            drawn = torch.randperm(len(near), generator=generator)[: settings.retain_batch]
            loss = sequence_loss(model, there, near[drawn])
        else:
            drawn = rows[torch.randperm(len(rows), generator=generator)[: settings.retain_batch]]
            part = forced(pairs[drawn], 1)
            logits = last_token_logits(model, there, part.clean, part.places)
            loss = torch.nn.functional.cross_entropy(logits, part.answer_tokens)
        for value, gradient in zip(flat, torch.autograd.grad(loss, flat), strict=True):
            value.grad = gradient
        optimizer.step()
    return Attacked({name: (value - start[name]).detach() for name, value in moved().items()}, others)
