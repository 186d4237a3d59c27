"""Gradient ascent: push the likelihood of the forget answers down, nothing else.

Source: Jang et al. 2022, arXiv 2210.01504, eq. 1; `divergence_weight` > 0 gives the KL-regularised form, as "KL
minimization" in TOFU (Maini et al. 2024, arXiv 2401.06121): gradient ascent plus KL(original || model) on retain text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.results.digest import Digested
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.training import Batch, TrainingSettings, train


@dataclass(frozen=True)
class GaSettings(Digested):
    """Settings of gradient ascent.

    Attributes:
        training: the shared loop.
    """

    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass(frozen=True)
class GaKlSettings(Digested):
    """Settings of KL-regularised gradient ascent.

    Attributes:
        divergence_weight: weight of the divergence on retain text; 1 in TOFU.
        training: the shared loop.
    """

    divergence_weight: float = 1.0
    training: TrainingSettings = field(default_factory=TrainingSettings)


def ga(
    model: TransformerBridge,
    task: Task,
    settings: GaSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Unlearn with gradient ascent on the forget answers."""

    def loss(batch: Batch) -> Tensor:
        return batch.answer_log_prob(batch.forget_logits()).mean()

    return train(model, task, "ga", loss, settings.training, seed=seed, progress=progress, checkpoint=checkpoint)


def ga_kl(
    model: TransformerBridge,
    task: Task,
    settings: GaKlSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Unlearn with gradient ascent plus KL(original || model) on the retain text."""

    def loss(batch: Batch) -> Tensor:
        ascent = batch.answer_log_prob(batch.forget_logits()).mean()
        return ascent + settings.divergence_weight * batch.retain_divergence()

    return train(model, task, "ga-kl", loss, settings.training, seed=seed, progress=progress, checkpoint=checkpoint)
