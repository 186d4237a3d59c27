"""What a method minimises: a term that forgets and a term that retains. A term is a function of a batch, in nats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from mansu_tl.runs.metrics import kl_divergence
from mansu_tl.unlearning.batches import Batch

Term = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Objective:
    """`forget + retain_weight * retain`.

    Attributes:
        forget: a term on the forget prompts.
        retain: a term on the retain text; None = nothing holds it.
        retain_weight: of that term.
    """

    forget: Term
    retain: Term | None = None
    retain_weight: float = 1.0

    def terms(self, batch: Batch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Forget and retain term of one batch, the latter unweighted."""
        forget = self.forget(batch)
        return forget, forget.new_zeros(()) if self.retain is None else self.retain(batch)

    def __call__(self, batch: Batch) -> Float[Tensor, ""]:
        """The loss of one batch."""
        forget, retain = self.terms(batch)
        return forget + self.retain_weight * retain


def ascent(batch: Batch) -> Float[Tensor, ""]:
    """Log-likelihood of the forget answers, summed over their tokens, to be lowered: gradient ascent (Jang et al. 2022,
    arXiv 2210.01504, eq. 1)."""
    return batch.answer_log_prob(batch.forget_logits).mean()


def npo(beta: float) -> Term:
    """(2 / beta) E log(1 + (p / p_ref)^beta): Zhang et al. 2024, arXiv 2404.05868, eq. 3."""

    def term(batch: Batch) -> Float[Tensor, ""]:
        ratio = batch.answer_log_prob(batch.forget_logits) - batch.answer_log_prob(batch.original_logits)
        return 2 / beta * softplus(beta * ratio).mean()

    return term


def simnpo(beta: float, gamma: float) -> Term:
    """-(2 / beta) E log sigmoid(-(beta / |y|) log p - gamma), |y| the answer's tokens: Fan et al. 2024, arXiv 2410.07163,
    eq. 4."""

    def term(batch: Batch) -> Float[Tensor, ""]:
        per_token = batch.answer_log_prob(batch.forget_logits) / batch.pairs.option_lengths[:, 0]
        # -log sigmoid(-z) = softplus(z)
        return 2 / beta * softplus(beta * per_token + gamma).mean()

    return term


def likelihood(batch: Batch) -> Float[Tensor, ""]:
    """Mean next-token cross-entropy of the retain sequences: gradient descent on the retain set (GDR)."""
    return cross_entropy(batch.retained.logits, batch.retained.targets)


def divergence(batch: Batch) -> Float[Tensor, ""]:
    """Mean KL(original || model) of the next token over the retain sequences."""
    return kl_divergence(batch.retained.logits, batch.retained_before).mean()
