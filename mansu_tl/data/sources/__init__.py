"""Where tasks come from."""

from mansu_tl.data.sources.registry import load_task

__all__ = ["load_task"]


def __dir__() -> list[str]:
    return sorted(__all__)
