"""Edits and the methods that make them."""

from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.mansu_settings import MansuSettings
from mansu_tl.unlearning.registry import (
    Method,
    floored,
    headline,
    method_flags,
    method_title,
    methods,
    settings_of,
    unlearn,
)
from mansu_tl.unlearning.training import TrainingSettings

__all__ = [
    "Edit",
    "MansuSettings",
    "Method",
    "TrainingSettings",
    "floored",
    "headline",
    "method_flags",
    "method_title",
    "methods",
    "settings_of",
    "unlearn",
]


def __dir__() -> list[str]:
    return sorted(__all__)
