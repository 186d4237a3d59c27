"""Prompt pairs, questions and tasks."""

from mansu_tl.data.corruption import (
    Counterfactual,
    EmbeddingCorruption,
    Subject,
    corruptions,
    counterfactuals,
    register_corruption,
)
from mansu_tl.data.forced import Forced, forced
from mansu_tl.data.pairs import PromptPairs, Span
from mansu_tl.data.positions import Positions, positions
from mansu_tl.data.task import Questions, Sequences, Task

__all__ = [
    "Counterfactual",
    "EmbeddingCorruption",
    "Forced",
    "Positions",
    "PromptPairs",
    "Questions",
    "Sequences",
    "Span",
    "Subject",
    "Task",
    "corruptions",
    "counterfactuals",
    "forced",
    "positions",
    "register_corruption",
]


def __dir__() -> list[str]:
    return sorted(__all__)
