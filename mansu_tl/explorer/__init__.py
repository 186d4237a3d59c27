"""The explorer: choose pair, method, quantizer, size, edge or node, and see scores, weights and attention of it."""

from mansu_tl.explorer.entry import explore
from mansu_tl.explorer.explorer import Explorer
from mansu_tl.explorer.selection import Selection

__all__ = ["Explorer", "Selection", "explore"]


def __dir__() -> list[str]:
    return sorted(__all__)
