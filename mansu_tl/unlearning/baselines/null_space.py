"""Null space only: gradient ascent whose change of every matrix leaves the retain set's inputs where they were.

Source: the projection of AlphaEdit (Fang et al. 2024, arXiv 2410.02355), here on the whole change since the start: the
change of each matrix is multiplied by the projector onto the directions that hold at most `leak` of the retain inputs'
energy. No floor, no circuit, no retain loss: what the null space alone is worth.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.models import float32_copy, home, linear_weights
from mansu_tl.results.digest import Digested
from mansu_tl.unlearning.batches import joined
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.retain_statistics import input_moments, null_projector, require_null_space
from mansu_tl.unlearning.training import Batch, TrainingSettings, train


@dataclass(frozen=True)
class NullSpaceSettings(Digested):
    """Settings of null-space unlearning.

    Attributes:
        leak: share of the retain inputs' energy that the null space may hold.
        training: the shared loop.
    """

    leak: float = 0.02
    training: TrainingSettings = field(default_factory=TrainingSettings)


def null_space(
    model: TransformerBridge,
    task: Task,
    settings: NullSpaceSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Unlearn with gradient ascent inside the null space of the retain and near text.

    Raises:
        MansuError: too few tokens (as `require_null_space`), a matrix without a null space (as `null_projector`), or
            what the shared loop refuses.
    """
    hf, linear = float32_copy(model), linear_weights(model)
    text = joined(task.retain_text, task.near_text) if len(task.near_text) else task.retain_text
    moments = input_moments(hf, linear, text.to(home(hf)))
    require_null_space(text, moments)
    projectors = {name: null_projector(moment, settings.leak, name) for name, moment in moments.items()}
    values = dict(hf.named_parameters())
    only = {name: torch.ones_like(values[name], dtype=torch.bool) for name in linear}

    def project(name: str, change: Tensor) -> Tensor:
        p = projectors[name].to(change.dtype)
        return p @ change if linear[name].transposed else change @ p

    def loss(batch: Batch) -> Tensor:
        return batch.answer_log_prob(batch.forget_logits()).mean()

    rank = {name: int(p.diagonal().sum().round()) for name, p in projectors.items()}
    return train(
        model, task, "null-space", loss, settings.training, only=only, project=project,
        facts={"null_dimensions": rank}, seed=seed, progress=progress, checkpoint=checkpoint,
    )  # fmt: skip
