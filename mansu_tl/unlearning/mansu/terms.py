"""What MANSU minimises: the forget prompts answered as the model answers what it never saw, the rest as before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mansu_tl.data import PromptPairs, Sequences
from mansu_tl.data.wording import same_wording
from mansu_tl.errors import MansuError
from mansu_tl.runs.metrics import kl_divergence
from mansu_tl.runs.values import last_token_states
from mansu_tl.unlearning.batches import Batch
from mansu_tl.unlearning.mansu.settings import MansuSettings
from mansu_tl.unlearning.objectives import Objective

# Logits that exist at one time.
_MOST_NUMBERS = 2**26
# A difference smaller than this share of what it is taken between is not trusted.
_DIGITS = 5e-3


def objective(settings: MansuSettings, unknown: Ignorance) -> Objective:
    """Its forget and retain terms; what it adds (attacker, null space) hangs on the update and stands in the solver."""

    def forget(batch: Batch) -> Float[Tensor, ""]:
        asked, reference = batch.forget, unknown.of(batch.places)
        if settings.representation_weight:
            logits, states = last_token_states(batch.model, batch.values, asked.clean, asked.places)
            away = representation_loss(states, reference.state, reference.spread)
        else:
            logits, away = batch.forget_logits, batch.forget_logits.new_zeros(())
        return settings.representation_weight * away + forget_loss(
            logits, reference.reference, reference.pool, asked.answer_tokens, settings
        )

    def retain(batch: Batch) -> Float[Tensor, ""]:
        """Mean over far tokens plus `near_weight` times the mean over near ones, as one weighted pass."""
        found, weight = batch.retained, settings.near_weight
        is_near = found.rows >= batch.n_far
        weights = torch.where(is_near, weight / is_near.sum().clamp_min(1), 1 / (~is_near).sum())
        original = batch.retained_before
        loss = retain_loss(found.logits, original, found.targets, weights, likelihood=settings.likelihood)
        if not settings.odds_weight:
            return loss
        return loss + settings.odds_weight * lost_odds(found.logits, original, found.targets, weights)

    return Objective(forget, retain, settings.retain_weight)


def forget_loss(
    logits: Float[Tensor, "row vocab"],
    reference: Float[Tensor, "row vocab"],
    pool: Bool[Tensor, "row vocab"],
    answers: Int[Tensor, " row"],
    settings: MansuSettings,
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
    excess = log_p[rows, answers] - log_q[rows, answers] + settings.margin
    hinge = excess.relu().mean()
    weight = pool.float()
    count = weight.sum(1, keepdim=True)
    gap = log_p - log_q
    centred = (gap - (gap * weight).sum(1, keepdim=True) / count) * weight
    flat = torch.nn.functional.huber_loss(centred, torch.zeros_like(centred), delta=settings.band, reduction="none")
    flattening = (flat.sum(1) / count[:, 0]).mean()
    return settings.divergence_weight * divergence + settings.margin_weight * hinge + settings.band_weight * flattening


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


def lost_odds(
    logits: Float[Tensor, "token vocab"],
    original: Float[Tensor, "token vocab"],
    targets: Int[Tensor, " token"],
    weights: Float[Tensor, " token"],
) -> Float[Tensor, ""]:
    """By how many nats the odds of what was sure to come have fallen, weighted by token.

    Of targets that the original finds likelier than all other tokens together. Where one is near certain a divergence is
    flat, and its margin can go without any cost. Our definition.
    """
    before = _log_odds(original, targets)
    sure = weights * (before > 0)
    lost = (before - _log_odds(logits, targets)).relu()
    total = sure.sum()
    return (lost * sure).sum() / torch.where(total > 0, total, 1.0)


def _log_odds(logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """log p(target) - log p(any other)."""
    at = targets[:, None]
    others = logits.scatter(1, at, -torch.inf).logsumexp(-1)
    return logits.gather(1, at)[:, 0] - others


@dataclass(frozen=True)
class Ignorance:
    """What the original model says where it knows nothing, by the wording of the forget prompts. Our definition.

    Where an answer has several tokens, a wording is one with the answer's tokens so far behind it, and the never-seen prompts
    have the same ones.
    """

    wording: Int[Tensor, " place"]  # the row below that each asked position of the forget prompts has
    reference: Float[Tensor, "wording vocab"]  # mean next-token distribution over never-seen prompts of that wording
    pool: Bool[Tensor, "wording vocab"]  # tokens with which an option of any forget prompt of that wording goes on
    state: Float[Tensor, "wording layer d_model"]  # mean residual stream of those prompts, at their last token
    spread: Float[Tensor, "wording layer"]  # their mean squared distance to it

    def of(self, places: Int[Tensor, " place"]) -> Ignorance:
        """The same for some of the asked positions, each with a row of its own."""
        at = self.wording[places]
        every = torch.arange(len(at), device=at.device)
        return Ignorance(every, self.reference[at], self.pool[at], self.state[at], self.spread[at])


def ignorance(model: PreTrainedModel, pairs: PromptPairs, unseen: Sequences) -> Ignorance:
    """Measure the "never seen" distribution of the original model.

    Every forget prompt is matched with the never-seen prompts of closest wording: those that agree with it most where
    it does not differ from its own corrupt prompt. Where there are none, the corrupt prompts stand in.
    """
    if not len(unseen) and pairs.corruption is not None:
        raise MansuError(
            f"unseen: no prompt about what the model never met, and {pairs.corruption.kind} corruption leaves no corrupt "
            "prompts to stand in; give the task some"
        )
    unseen = unseen if len(unseen) else Sequences(pairs.corrupt, pairs.lengths)
    words = pairs.clean.masked_fill(pairs.changed, -1)
    closest, wording = same_wording(words, pairs.lengths, unseen).unique(dim=0, return_inverse=True)
    wordings, answers = wording.tolist(), pairs.texts()
    # The wordings in which an answer goes on after some tokens; after none, all of them.
    after: dict[tuple[int, ...], set[int]] = {}
    for one, texts in zip(wordings, answers, strict=True):
        for step in range(len(texts[0])):
            after.setdefault(texts[0][:step], set()).add(one)
    number: dict[tuple[int, tuple[int, ...]], int] = {}
    parts = []
    for before, wanted in after.items():
        number |= {(one, before): len(number) + i for i, one in enumerate(sorted(wanted))}
        parts.append(_unknown(model, unseen, before, closest[sorted(wanted)]))
    reference, state, spread = (torch.cat(part) for part in zip(*parts, strict=True))
    pool = torch.zeros_like(reference, dtype=torch.bool)
    places = []
    for one, texts in zip(wordings, answers, strict=True):
        places += [number[one, texts[0][:step]] for step in range(len(texts[0]))]
        for text in texts:
            for step, token in enumerate(text):
                if (one, text[:step]) in number:
                    pool[number[one, text[:step]], token] = True
    return Ignorance(torch.tensor(places, device=wording.device), reference, pool, state, spread)


def _unknown(
    model: PreTrainedModel, unseen: Sequences, before: tuple[int, ...], closest: Bool[Tensor, "wording unseen"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference, state and spread of some wordings, with some tokens behind every never-seen prompt."""
    if before:
        some = closest.any(0)
        unseen, closest = unseen[some.nonzero()[:, 0]].followed(before), closest[:, some]
    mean = closest.float() / closest.sum(1, keepdim=True)
    values, parts = dict(model.named_parameters()), []
    vocab = model.get_output_embeddings().weight.shape[0]
    reference = torch.zeros(len(closest), vocab, device=mean.device)
    rows = max(1, _MOST_NUMBERS // vocab)
    for start in range(0, len(unseen), rows):
        part = unseen[slice(start, start + rows)]
        with torch.no_grad():
            logits, hidden = last_token_states(model, values, part.tokens, part.lengths)
        reference += mean[:, start : start + rows] @ logits.softmax(-1)
        parts.append(hidden)
    states = torch.cat(parts)
    state = torch.einsum("wu,uld->wld", mean, states)
    square = torch.einsum("wu,ul->wl", mean, states.square().sum(-1))
    spread = square - state.square().sum(-1)
    # A small difference of large numbers has few digits left, in TF32 none: there the distances are taken themselves.
    for at in (spread < _DIGITS * square).any(1).nonzero()[:, 0].tolist():
        apart = (mean[at, :, None] * (states - state[at]).square().sum(-1)).sum(0)
        spread[at] = torch.where(spread[at] < _DIGITS * square[at], apart, spread[at])
    # A single prompt of that wording has no spread of its own: all never-seen prompts' around their mean stands in.
    common = (states - states.mean(0)).square().sum(-1).mean(0)
    return reference, state, torch.where(closest.sum(1, keepdim=True) > 1, spread, common)
