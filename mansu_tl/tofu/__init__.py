"""TOFU (Maini et al. 2024) as far as a small model gives it meaning: files, task, measures; training is in `train`."""

from mansu_tl.tofu.data import Item, Tofu, read_tofu
from mansu_tl.tofu.evaluate import SetScores, TofuScores, evaluate_tofu
from mansu_tl.tofu.task import tofu_task

__all__ = ["Item", "SetScores", "Tofu", "TofuScores", "evaluate_tofu", "read_tofu", "tofu_task"]


def __dir__() -> list[str]:
    return sorted(__all__)
