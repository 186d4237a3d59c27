"""Output suppressor: behaviour without structure. Only the last MLP learns to talk over the answer.

A control of our own for CAD and the erasure evidence: the loss is NPO + GDR, but everything below the last layer's MLP
stays bit for bit, so whatever the model knew on the way there it still knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.models import Anatomy, component_masks
from mansu_tl.results.digest import Digested
from mansu_tl.unlearning.baselines.npo import npo_loss
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.training import Batch, TrainingSettings, train


@dataclass(frozen=True)
class SuppressorSettings(Digested):
    """Settings of the output suppressor.

    Attributes:
        beta: as in NPO.
        retain_weight: weight of the retain loss.
        training: the shared loop, with the learning rate that a single MLP needs.
    """

    beta: float = 0.1
    retain_weight: float = 1.0
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(learning_rate=3e-4))


def suppressor(
    model: TransformerBridge,
    task: Task,
    settings: SuppressorSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Train the last layer's MLP to keep the forget answers from coming out."""
    only = component_masks(model, [f"MLP{Anatomy.of(model).n_layers - 1}"])

    def loss(batch: Batch) -> Tensor:
        return npo_loss(batch, settings.beta) + settings.retain_weight * batch.retain_loss()

    return train(
        model,
        task,
        "suppressor",
        loss,
        settings.training,
        only=only,
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
    )
