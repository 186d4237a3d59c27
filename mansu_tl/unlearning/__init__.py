"""Edits and the methods that make them."""

from mansu_tl.unlearning import recipes as _recipes  # noqa: F401 - each of them registers a method
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.mansu.settings import MansuSettings
from mansu_tl.unlearning.objectives import Objective
from mansu_tl.unlearning.registry import (
    Method,
    floored,
    headline,
    method_flags,
    method_title,
    methods,
    register,
    settings_of,
)
from mansu_tl.unlearning.training import Recipe, RetainSettings, StandIns, TrainedSettings, TrainingSettings, trained
from mansu_tl.unlearning.unlearn import unlearn

__all__ = [
    "Edit",
    "MansuSettings",
    "Method",
    "Objective",
    "Recipe",
    "RetainSettings",
    "StandIns",
    "TrainedSettings",
    "TrainingSettings",
    "floored",
    "headline",
    "method_flags",
    "method_title",
    "methods",
    "register",
    "settings_of",
    "trained",
    "unlearn",
]


def __dir__() -> list[str]:
    return sorted(__all__)
