"""All methods on all bases under all quantizers and seeds, as one resumable run."""

from mansu_tl.comparison.figures import figures
from mansu_tl.comparison.markdown import markdown
from mansu_tl.comparison.plan import Comparison, full, quick
from mansu_tl.comparison.run import ComparisonResult, compare
from mansu_tl.comparison.tables import properties, summary

__all__ = [
    "Comparison",
    "ComparisonResult",
    "compare",
    "figures",
    "full",
    "markdown",
    "properties",
    "quick",
    "summary",
]


def __dir__() -> list[str]:
    return sorted(__all__)
