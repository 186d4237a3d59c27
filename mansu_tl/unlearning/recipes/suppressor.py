"""Output suppressor: behaviour without structure. Only the last MLP learns to talk over the answer.

A control of our own for CAD and the erasure evidence: the objective is NPO + GDR, but everything below the last layer's
MLP stays bit for bit, so whatever the model knew on the way there it still knows.
"""

from __future__ import annotations

from dataclasses import dataclass

from mansu_tl.models import Anatomy, component_masks
from mansu_tl.unlearning.recipes.npo import NpoSettings, npo
from mansu_tl.unlearning.training import LARGE, Recipe, Start, TrainingSettings, trained


@dataclass(frozen=True)
class SuppressorSettings(NpoSettings):
    """NPO's settings.

    Attributes:
        training: the shared loop, with the learning rate that a single MLP needs.
    """

    training: TrainingSettings = LARGE


@trained("suppressor", "Output suppressor", SuppressorSettings)
def suppressor(settings: SuppressorSettings, start: Start) -> Recipe:
    """NPO in the last layer's MLP alone."""
    last = f"MLP{Anatomy.of(start.model).n_layers - 1}"
    return Recipe(npo(settings, start).objective, component_masks(start.model, [last]))
