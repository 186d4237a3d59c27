"""Gradient ascent: push the likelihood of the forget answers down; alone, or with KL(original || model) on retain text.

Source: Jang et al. 2022, arXiv 2210.01504, eq. 1; the regularised form is "KL minimization" in TOFU (Maini et al. 2024,
arXiv 2401.06121).
"""

from __future__ import annotations

from dataclasses import dataclass

from mansu_tl.unlearning.objectives import Objective, ascent, divergence
from mansu_tl.unlearning.training import Recipe, Start, TrainedSettings, trained


@dataclass(frozen=True)
class GaKlSettings(TrainedSettings):
    """Settings of KL-regularised gradient ascent, beside the shared `training`.

    Attributes:
        divergence_weight: weight of the divergence on retain text; 1 in TOFU.
    """

    divergence_weight: float = 1.0


@trained("ga", "GA", TrainedSettings)
def ga(settings: TrainedSettings, start: Start) -> Recipe:
    """Ascent on the forget answers, nothing else."""
    return Recipe(Objective(ascent))


@trained("ga-kl", "GA + KL", GaKlSettings)
def ga_kl(settings: GaKlSettings, start: Start) -> Recipe:
    """Ascent, held by the divergence from the original on retain text."""
    return Recipe(Objective(ascent, divergence, settings.divergence_weight))
