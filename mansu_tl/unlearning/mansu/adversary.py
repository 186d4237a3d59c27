"""An attacker inside the loop: what a few steps of fine-tuning on some forget facts would change.

First order, after tamper-resistant training (Tamirisa et al. 2024, arXiv 2408.00761): the attack's change of the weights
is held fixed, and the forget loss on the facts that it did not train on is taken at the attacked weights. An attacker who is
always the same is one that an edit can hide from, so his facts, steps and rate can be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mansu_tl.data import PromptPairs
from mansu_tl.data.forced import forced
from mansu_tl.runs.values import Values, last_token_logits
from mansu_tl.unlearning.mansu.settings import MansuSettings


@dataclass(frozen=True)
class Attacked:
    """One attack."""

    change: dict[str, Tensor]  # by parameter
    others: Int[Tensor, " row"]  # pairs about the facts that it did not train on


@dataclass(frozen=True)
class Means:
    """What an attacker has: how many facts to train on, for how many steps, at what learning rate."""

    facts: int
    steps: int
    rate: float

    @classmethod
    def drawn(cls, settings: MansuSettings, known: int, spread: float, generator: torch.Generator) -> Means:
        """Those of the settings, each times a factor between 1 / spread and spread, even in the logarithm.

        Args:
            known: how many forget facts there are; one at least stays to be defended.
            spread: 1 draws nothing.
        """
        facts, steps, rate = settings.attacked_facts(known), settings.adversary_steps, settings.adversary_rate
        if spread == 1:
            return cls(facts, steps, rate)
        more, longer, faster = (spread ** (2 * torch.rand(3, generator=generator) - 1)).tolist()
        return cls(min(known - 1, max(1, round(more * facts))), max(1, round(longer * steps)), faster * rate)


def attacked(
    model: PreTrainedModel,
    values: Values,
    names: tuple[str, ...],
    pairs: PromptPairs,
    facts: Int[Tensor, " pair"],
    settings: MansuSettings,
    generator: torch.Generator,
    spread: float = 1.0,
) -> Attacked:
    """Fine-tune the parameters of some names, from `values` on, on the pairs about a few random facts with Adam.

    Args:
        spread: as in `Means.drawn`.
    """
    means = Means.drawn(settings, int(facts.max()) + 1, spread, generator)
    every = torch.randperm(int(facts.max()) + 1, generator=generator)
    known = torch.isin(facts.cpu(), every[: means.facts])
    rows, others = known.nonzero()[:, 0], (~known).nonzero()[:, 0]
    start = {name: values[name].detach().float() for name in names}
    moving = {name: value.clone().requires_grad_() for name, value in start.items()}
    rest = {name: value.detach() for name, value in values.items() if name not in moving}
    optimizer = torch.optim.Adam(list(moving.values()), lr=means.rate)
    for _ in range(means.steps):
        drawn = rows[torch.randperm(len(rows), generator=generator)[: settings.retain_batch]]
        part = forced(pairs[drawn], 1)
        logits = last_token_logits(model, {**rest, **moving}, part.clean, part.places)
        loss = torch.nn.functional.cross_entropy(logits, part.answer_tokens)
        gradients = torch.autograd.grad(loss, list(moving.values()))
        for value, gradient in zip(moving.values(), gradients, strict=True):
            value.grad = gradient
        optimizer.step()
    return Attacked({name: (moving[name] - start[name]).detach() for name in names}, others)
