"""Null space only: gradient ascent whose change of every matrix leaves the retain set's inputs where they were.

Source: the projection of AlphaEdit (Fang et al. 2024, arXiv 2410.02355), here on the whole change since the start: the
change of each matrix is multiplied by the projector onto the directions that hold at most `leak` of the retain inputs'
energy. No floor, no circuit, no retain loss: what the null space alone is worth.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mansu_tl.models import float32_copy, home, linear_weights
from mansu_tl.unlearning.masks import every_weight
from mansu_tl.unlearning.objectives import Objective, ascent
from mansu_tl.unlearning.retain_statistics import input_moments, null_projector, require_null_space
from mansu_tl.unlearning.training import Recipe, Start, TrainedSettings, trained


@dataclass(frozen=True)
class NullSpaceSettings(TrainedSettings):
    """Settings of null-space unlearning, beside the shared `training`.

    Attributes:
        leak: share of the retain inputs' energy that the null space may hold.
    """

    leak: float = 0.02


@trained("null-space", "Null space only", NullSpaceSettings)
def null_space(settings: NullSpaceSettings, start: Start) -> Recipe:
    """Ascent inside the null space of the retain and near text, if there is text enough for one."""
    hf, linear, task = float32_copy(start.model), linear_weights(start.model), start.task
    text = task.retain_text.joined(task.near_text)
    moments = input_moments(hf, linear, text.to(home(hf)))
    require_null_space(text, (moment.shape[0] for moment in moments.values()))
    projectors = {name: null_projector(moment, settings.leak, name) for name, moment in moments.items()}

    def project(name: str, change: Tensor) -> Tensor:
        p = projectors[name].to(change.dtype)
        return p @ change if linear[name].transposed else change @ p

    rank = {name: int(p.diagonal().sum().round()) for name, p in projectors.items()}
    return Recipe(Objective(ascent), every_weight(start.model), project=project, facts={"null_dimensions": rank})
