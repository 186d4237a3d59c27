"""What a result is, how it lies on disk, and what a mean's interval is; the ground floor, which imports no other room."""

from mansu_tl.results.digest import Digested, digest
from mansu_tl.results.intervals import interval_over_facts, interval_over_seeds, with_interval
from mansu_tl.results.result import Result, Table, bars, four_digits
from mansu_tl.results.serialise import MismatchError, require_finite
from mansu_tl.results.store import Store

__all__ = [
    "Digested",
    "MismatchError",
    "Result",
    "Store",
    "Table",
    "bars",
    "digest",
    "four_digits",
    "interval_over_facts",
    "interval_over_seeds",
    "require_finite",
    "with_interval",
]


def __dir__() -> list[str]:
    return sorted(__all__)
