"""NPO + GDR: negative preference optimization, with descent on the retain text.

Source: Zhang et al. 2024, arXiv 2404.05868, eq. 3: (2 / beta) E log(1 + (p / p_ref)^beta), beta = .1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.results.digest import Digested
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.training import Batch, TrainingSettings, train


@dataclass(frozen=True)
class NpoSettings(Digested):
    """Settings of NPO.

    Attributes:
        beta: inverse temperature of the preference loss; 0.1 in the paper.
        retain_weight: weight of the retain loss.
        training: the shared loop.
    """

    beta: float = 0.1
    retain_weight: float = 1.0
    training: TrainingSettings = field(default_factory=TrainingSettings)


def npo(
    model: TransformerBridge,
    task: Task,
    settings: NpoSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Unlearn with negative preference optimization plus gradient descent on the retain set."""

    def loss(batch: Batch) -> Tensor:
        return npo_loss(batch, settings.beta) + settings.retain_weight * batch.retain_loss()

    return train(model, task, "npo", loss, settings.training, seed=seed, progress=progress, checkpoint=checkpoint)


def npo_loss(batch: Batch, beta: float) -> Float[Tensor, ""]:
    """The preference loss on this step's forget prompts, in nats."""
    ratio = batch.answer_log_prob(batch.forget_logits()) - batch.answer_log_prob(batch.original_logits)
    return 2 / beta * softplus(beta * ratio).mean()
