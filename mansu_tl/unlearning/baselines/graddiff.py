"""GradDiff (GA + GDR): ascend on the forget answers, descend on the retain text.

Source: Liu et al. 2022, arXiv 2203.12817; as the baseline of TOFU, Maini et al. 2024, arXiv 2401.06121.
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
class GradDiffSettings(Digested):
    """Settings of GradDiff.

    Attributes:
        retain_weight: weight of the retain loss against the ascent.
        training: the shared loop.
    """

    retain_weight: float = 1.0
    training: TrainingSettings = field(default_factory=TrainingSettings)


def graddiff(
    model: TransformerBridge,
    task: Task,
    settings: GradDiffSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Unlearn with gradient ascent on the forget set plus gradient descent on the retain set."""

    def loss(batch: Batch) -> Tensor:
        return batch.answer_log_prob(batch.forget_logits()).mean() + settings.retain_weight * batch.retain_loss()

    return train(model, task, "graddiff", loss, settings.training, seed=seed, progress=progress, checkpoint=checkpoint)
