"""The embedded task: an invented world of facts that the embedded models know (`python -m scripts.train_pocket`)."""

from mansu_tl.data.sources.pocket.task import pocket_task
from mansu_tl.data.sources.pocket.world import Fact, World, build_world

__all__ = ["Fact", "World", "build_world", "pocket_task"]


def __dir__() -> list[str]:
    return sorted(__all__)
