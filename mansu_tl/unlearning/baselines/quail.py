"""QUAIL: GA + GDR with a hinge that asks every forget prompt's logits to move by a margin.

Source: Mishra & Mehreen 2026, arXiv 2601.15538: the logits of the unlearned model must differ from the original's by at
least half the quantization step. The paper leaves the distance open; ours is the root-mean-square difference over the
vocabulary, and the step is that of a 4-bit grid over the range of the original logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.training import Batch, TrainingSettings, train

_STEPS_OF_4_BIT = 15


@dataclass(frozen=True)
class QuailSettings:
    """Settings of QUAIL.

    Attributes:
        hinge_weight: weight of the hinge.
        margin_steps: the margin, in quantization steps of the logits; the paper's is one half.
        retain_weight: weight of the retain loss.
        training: the shared loop.
    """

    hinge_weight: float = 1.0
    margin_steps: float = 0.5
    retain_weight: float = 1.0
    training: TrainingSettings = field(default_factory=TrainingSettings)


def quail(
    model: TransformerBridge, task: Task, settings: QuailSettings, *, seed: int = 0, progress: bool = False
) -> Edit:
    """Unlearn with GradDiff plus QUAIL's logit hinge."""

    def loss(batch: Batch) -> Tensor:
        logits, before = batch.forget_logits(), batch.original_logits
        step = (before.amax(1) - before.amin(1)) / _STEPS_OF_4_BIT
        distance = (logits - before).square().mean(1).add(1e-12).sqrt()
        hinge = (settings.margin_steps * step - distance).relu().mean()
        ascent = batch.answer_log_prob(logits).mean()
        return ascent + settings.hinge_weight * hinge + settings.retain_weight * batch.retain_loss()

    return train(model, task, "quail", loss, settings.training, seed=seed, progress=progress)
