"""TOFU (Maini et al. 2024, arXiv 2401.06121): its files, and a task of one-token questions inside its answers."""

from mansu_tl.data.sources.tofu.files import Item, Tofu, read_tofu
from mansu_tl.data.sources.tofu.task import tofu_task

__all__ = ["Item", "Tofu", "read_tofu", "tofu_task"]


def __dir__() -> list[str]:
    return sorted(__all__)
