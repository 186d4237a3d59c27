"""MANSU in the early layers: where a fact is written, not where it is said; see `MansuSettings.early`."""

from __future__ import annotations

from mansu_tl.unlearning.mansu.plan import mansu_needs
from mansu_tl.unlearning.mansu.settings import EARLY, MansuSettings
from mansu_tl.unlearning.mansu.solver import mansu
from mansu_tl.unlearning.registry import Method, register


def _foreign(settings: MansuSettings) -> str:
    """Settings of `mansu`: they edit every layer and have no place."""
    if settings.depth < 1 or settings.place_weight:
        return ""
    return "depth=1.0 without a place_weight is method 'mansu'; start from MansuSettings.early(), or choose 'mansu'"


MANSU_EARLY = register(
    Method(
        "mansu-early",
        "MANSU, early layers",
        MansuSettings,
        mansu,
        takes_circuit=True,
        shares=True,
        claims_floor=True,
        searched=False,
        preset=EARLY,
        needs=mansu_needs,
        foreign=_foreign,
    )
)
