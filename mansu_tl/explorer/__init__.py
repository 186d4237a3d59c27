"""The explorer: a page that shows a circuit and what became of it, and asks the models behind it."""

from mansu_tl.explorer.entry import explore
from mansu_tl.explorer.explorer import Explorer
from mansu_tl.explorer.live import Switched
from mansu_tl.explorer.opening import open_results
from mansu_tl.explorer.selection import Selection
from mansu_tl.explorer.server import ExplorerServer
from mansu_tl.explorer.view import ExplorerView

__all__ = ["Explorer", "ExplorerServer", "ExplorerView", "Selection", "Switched", "explore", "open_results"]


def __dir__() -> list[str]:
    return sorted(__all__)
