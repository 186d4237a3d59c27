"""Prompt pairs, questions and tasks."""

from mansu_tl.data.pairs import PromptPairs
from mansu_tl.data.task import Questions, Sequences, Task

__all__ = ["PromptPairs", "Questions", "Sequences", "Task"]
