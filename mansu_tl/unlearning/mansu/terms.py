"""What MANSU minimises: the forget prompts answered as the model answers what it never saw, the rest as before."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mansu_tl.runs.metrics import kl_divergence
from mansu_tl.unlearning.batches import Batch
from mansu_tl.unlearning.forward import last_token_states
from mansu_tl.unlearning.mansu.ignorance import Ignorance
from mansu_tl.unlearning.mansu.settings import MansuSettings
from mansu_tl.unlearning.objectives import Objective


def objective(settings: MansuSettings, unknown: Ignorance) -> Objective:
    """Its forget and retain terms; what it adds (attacker, null space) hangs on the update and stands in the solver."""

    def forget(batch: Batch) -> Float[Tensor, ""]:
        pairs, reference = batch.pairs, unknown.of(batch.rows)
        if settings.representation_weight:
            logits, states = last_token_states(batch.model, batch.values, pairs.clean, pairs.lengths)
            away = representation_loss(states, reference.state, reference.spread)
        else:
            logits, away = batch.forget_logits, batch.forget_logits.new_zeros(())
        return settings.representation_weight * away + forget_loss(
            logits,
            reference.reference,
            reference.pool,
            pairs.answers,
            divergence_weight=settings.divergence_weight,
            margin=settings.margin,
            margin_weight=settings.margin_weight,
            band=settings.band,
            band_weight=settings.band_weight,
        )

    def retain(batch: Batch) -> Float[Tensor, ""]:
        """Mean over far tokens plus `near_weight` times the mean over near ones, as one weighted pass."""
        found, weight = batch.retained, settings.near_weight
        is_near = found.rows >= batch.n_far
        weights = torch.where(is_near, weight / is_near.sum().clamp_min(1), 1 / (~is_near).sum())
        original = batch.retained_before
        return retain_loss(found.logits, original, found.targets, weights, likelihood=settings.likelihood)

    return Objective(forget, retain, settings.retain_weight)


def forget_loss(
    logits: Float[Tensor, "row vocab"],
    reference: Float[Tensor, "row vocab"],
    pool: Bool[Tensor, "row vocab"],
    answers: Int[Tensor, " row"],
    *,
    divergence_weight: float,
    margin: float,
    margin_weight: float,
    band: float,
    band_weight: float,
) -> Float[Tensor, ""]:
    """Distance from ignorance, in nats.

    Three parts, each with its weight: KL(never seen || model); a hinge that keeps the answer `margin` nats below what
    never-seen prompts give it (a divergence alone stops while the answer is still the likeliest option); and a Huber of
    width `band` on the answer pool's centred log-probabilities, which flattens them to the reference in both directions.
    """
    log_p = logits.log_softmax(-1)
    log_q = reference.clamp_min(1e-9).log()
    rows = torch.arange(logits.shape[0], device=logits.device)
    divergence = kl_divergence(logits, log_q).mean()
    excess = log_p[rows, answers] - log_q[rows, answers] + margin
    hinge = excess.relu().mean()
    weight = pool.float()
    count = weight.sum(1, keepdim=True)
    gap = log_p - log_q
    centred = (gap - (gap * weight).sum(1, keepdim=True) / count) * weight
    flat = torch.nn.functional.huber_loss(centred, torch.zeros_like(centred), delta=band, reduction="none")
    return divergence_weight * divergence + margin_weight * hinge + band_weight * (flat.sum(1) / count[:, 0]).mean()


def representation_loss(
    hidden: Float[Tensor, "row layer d_model"],
    mean: Float[Tensor, "row layer d_model"],
    spread: Float[Tensor, "row layer"],
) -> Float[Tensor, ""]:
    """How far forget prompts' hidden states lie from those of never-seen prompts of the same wording.

    The squared distance to the never-seen mean, in units of the never-seen prompts' own mean squared distance to it:
    1 = as far as a name that stands for nothing. Averaged over layers. Our definition, after representation-level
    erasure towards unknown entities.
    """
    distance = (hidden - mean).square().sum(-1)
    return (distance / spread).mean()


def retain_loss(
    logits: Float[Tensor, "token vocab"],
    original: Float[Tensor, "token vocab"],
    targets: Int[Tensor, " token"],
    weights: Float[Tensor, " token"],
    *,
    likelihood: float,
) -> Float[Tensor, ""]:
    """KL(original || model) on the retain tokens plus `likelihood` times their cross-entropy, weighted by token."""
    total = weights.sum()
    divergence = (kl_divergence(logits, original) * weights).sum() / total
    entropy = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / total
    return divergence + likelihood * entropy
