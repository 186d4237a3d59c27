"""An attacker inside the loop: what a few steps of fine-tuning on some forget facts would change.

First order, after tamper-resistant training (Tamirisa et al. 2024, arXiv 2408.00761): the attack's change of the weights
is held fixed, and the forget loss on the facts that it did not train on is taken at the attacked weights.
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


def attacked(
    model: PreTrainedModel,
    values: Values,
    names: tuple[str, ...],
    pairs: PromptPairs,
    facts: Int[Tensor, " pair"],
    settings: MansuSettings,
    generator: torch.Generator,
) -> Attacked:
    """Fine-tune the parameters of some names, from `values` on, on the pairs about a few random facts with Adam."""
    every = torch.randperm(int(facts.max()) + 1, generator=generator)
    known = torch.isin(facts.cpu(), every[: settings.attacked_facts(len(every))])
    rows, others = known.nonzero()[:, 0], (~known).nonzero()[:, 0]
    start = {name: values[name].detach().float() for name in names}
    moving = {name: value.clone().requires_grad_() for name, value in start.items()}
    rest = {name: value.detach() for name, value in values.items() if name not in moving}
    optimizer = torch.optim.Adam(list(moving.values()), lr=settings.adversary_rate)
    for _ in range(settings.adversary_steps):
        drawn = rows[torch.randperm(len(rows), generator=generator)[: settings.retain_batch]]
        part = forced(pairs[drawn], 1)
        logits = last_token_logits(model, {**rest, **moving}, part.clean, part.places)
        loss = torch.nn.functional.cross_entropy(logits, part.answer_tokens)
        gradients = torch.autograd.grad(loss, list(moving.values()))
        for value, gradient in zip(moving.values(), gradients, strict=True):
            value.grad = gradient
        optimizer.step()
    return Attacked({name: (moving[name] - start[name]).detach() for name in names}, others)
