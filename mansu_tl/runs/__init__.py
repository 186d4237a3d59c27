"""Running a model with hooks: what is recorded, switched off, taken up from a layer on, and measured."""

from mansu_tl.runs.ablation import Ablation, ablation
from mansu_tl.runs.metrics import (
    Accuracy,
    accuracy,
    answer_log_prob,
    choice_log_odds,
    kl_divergence,
    last_logits,
    logit_difference,
)
from mansu_tl.runs.years import YearDifference

__all__ = [
    "Ablation",
    "Accuracy",
    "YearDifference",
    "ablation",
    "accuracy",
    "answer_log_prob",
    "choice_log_odds",
    "kl_divergence",
    "last_logits",
    "logit_difference",
]


def __dir__() -> list[str]:
    return sorted(__all__)
