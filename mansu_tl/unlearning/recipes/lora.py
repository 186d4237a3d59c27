"""LoRA: a published loss, trained in low-rank adapters on the linear layers that are merged at the end.

Source: Abitante et al. 2026, "Quantization-robust LLM unlearning via low-rank adaptation", arXiv 2602.13151: the base model
is frozen and the forgetting is concentrated in adapters, so that the update of the weights they change is large enough for
4-bit rounding. They train GA and NPO, each with GDR and KLR. The default here is NPO + GDR, where their abstract reports
the largest gain. Rank and scale are ours (we had the paper's abstract and introduction only): 8, and alpha twice the rank.
The adapters begin and are scaled as in Hu et al. 2021, arXiv 2106.09685. Merged weights are one edit like any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, parameters
from mansu_tl.models.low_rank import low_rank_factors, with_adapters
from mansu_tl.runs.values import Values
from mansu_tl.unlearning import objectives
from mansu_tl.unlearning.objectives import ascent, divergence, likelihood
from mansu_tl.unlearning.training import LARGE, Recipe, RetainSettings, StandIns, Start, TrainingSettings, trained

_OBJECTIVES = {
    "graddiff": (ascent, likelihood),
    "ga-kl": (ascent, divergence),
    "npo": (objectives.npo(0.1), likelihood),
    "npo-kl": (objectives.npo(0.1), divergence),
}


@dataclass(frozen=True)
class LoraSettings(RetainSettings):
    """Settings of LoRA unlearning, beside `retain_weight`.

    Attributes:
        training: the shared loop, with a learning rate ten times the other baselines'.
        rank: of every adapter.
        alpha: the adapters' product is scaled by alpha / rank.
        objective: "npo" (beta .1), "npo-kl", "graddiff" or "ga-kl".
        matrices: parts of names of the matrices that get an adapter, with commas between, e.g. "q_proj,v_proj"; "" = every
            linear layer.
    """

    training: TrainingSettings = LARGE
    rank: int = 8
    alpha: float = 16.0
    objective: str = "npo"
    matrices: str = ""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise MansuError(f"lora: rank={self.rank}; choose at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise MansuError(f"lora: alpha={self.alpha}; choose a finite number above 0")
        if self.objective not in _OBJECTIVES:
            raise MansuError(f"lora: objective={self.objective!r}; choose one of {', '.join(_OBJECTIVES)}")


@trained("lora", "LoRA", LoraSettings)
def lora(settings: LoraSettings, start: Start) -> Recipe:
    """The chosen loss, trained in adapters."""
    linear = linear_weights(start.model)
    parts = [part.strip() for part in settings.matrices.split(",") if part.strip()]
    names = [name for name in linear if not parts or any(part in name for part in parts)]
    if not names:
        raise MansuError(
            f"lora: matrices={settings.matrices!r} is in no linear layer's name; choose parts of names, e.g. of "
            f"{next(iter(linear))}"
        )
    factors = low_rank_factors(parameters(start.model), names, settings.rank, start.seed)
    begin = {f"{name}.{end}": each for name, pair in factors.items() for end, each in zip("AB", pair, strict=True)}

    def merged(original: Values, adapters: Values) -> dict[str, Tensor]:
        pairs = {name: (adapters[f"{name}.A"], adapters[f"{name}.B"]) for name in names}
        return with_adapters(original, pairs, settings.alpha / settings.rank)

    forget, retain = _OBJECTIVES[settings.objective]
    facts = {"rank": settings.rank, "alpha": settings.alpha, "objective": settings.objective, "adapters": len(names)}
    return Recipe(
        objectives.Objective(forget, retain, settings.retain_weight), instead=StandIns(begin, merged), facts=facts
    )
