"""Where tasks come from: one file a format, each registered by name."""

from mansu_tl.data.sources import rows, jsonl, csv, tofu, pocket  # noqa: F401, I001 - in the order in which they are listed
from mansu_tl.data.sources.registry import Source, beside, load_task, register_source, source, sources
from mansu_tl.data.sources.rows import rows_reader

__all__ = ["Source", "beside", "load_task", "register_source", "rows_reader", "source", "sources"]


def __dir__() -> list[str]:
    return sorted(__all__)
