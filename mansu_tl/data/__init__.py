"""Prompt pairs, questions and tasks."""

from mansu_tl.data.pairs import PromptPairs, Span
from mansu_tl.data.positions import Positions, positions
from mansu_tl.data.task import Questions, Sequences, Task

__all__ = ["Positions", "PromptPairs", "Questions", "Sequences", "Span", "Task", "positions"]


def __dir__() -> list[str]:
    return sorted(__all__)
