"""SimNPO + GDR: NPO without a reference model, its reward normalised by length.

Source: Fan et al. 2024, arXiv 2410.07163, eq. 4: -(2 / beta) E log sigmoid(-(beta / |y|) log p(y | x) - gamma), where
|y| = 1 here because an answer is one token. beta = 2.5 and gamma = 0 are its TOFU settings, retain weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import softplus
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.results.digest import Digested
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.training import Batch, TrainingSettings, train


@dataclass(frozen=True)
class SimNpoSettings(Digested):
    """Settings of SimNPO.

    Attributes:
        beta: inverse temperature of the reward.
        gamma: reward margin.
        retain_weight: weight of the retain loss.
        training: the shared loop.
    """

    beta: float = 2.5
    gamma: float = 0.0
    retain_weight: float = 1.0
    training: TrainingSettings = field(default_factory=TrainingSettings)


def simnpo(
    model: TransformerBridge,
    task: Task,
    settings: SimNpoSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Unlearn with SimNPO plus gradient descent on the retain set."""

    def loss(batch: Batch) -> Tensor:
        log_p = batch.answer_log_prob(batch.forget_logits())
        # -log sigmoid(-z) = softplus(z)
        forget = 2 / settings.beta * softplus(settings.beta * log_p + settings.gamma).mean()
        return forget + settings.retain_weight * batch.retain_loss()

    return train(model, task, "simnpo", loss, settings.training, seed=seed, progress=progress, checkpoint=checkpoint)
