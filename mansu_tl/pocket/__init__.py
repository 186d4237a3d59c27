"""The embedded default: an invented world of facts, its task, and small models that know it.

Train them again with `python -m mansu_tl.pocket.train`.
"""

from mansu_tl.pocket.checkpoints import CHECKPOINTS, checkpoint_folder
from mansu_tl.pocket.task import pocket_task
from mansu_tl.pocket.world import Fact, World, build_world

__all__ = ["CHECKPOINTS", "Fact", "World", "build_world", "checkpoint_folder", "pocket_task"]


def __dir__() -> list[str]:
    return sorted(__all__)
