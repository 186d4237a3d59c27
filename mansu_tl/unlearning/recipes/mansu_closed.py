"""MANSU in closed form: no gradient of the weights, minutes on models of many layers; see `unlearning.mansu.closed`."""

from __future__ import annotations

from mansu_tl.unlearning.mansu.plan import mansu_needs
from mansu_tl.unlearning.mansu.settings import CLOSED, MansuSettings
from mansu_tl.unlearning.mansu.solver import mansu
from mansu_tl.unlearning.registry import Method, register


def _foreign(settings: MansuSettings) -> str:
    """Settings of `mansu`: they ask for its solver."""
    if settings.solver == "closed":
        return ""
    return f"solver={settings.solver!r} is a setting of method 'mansu'; start from MansuSettings.closed(), or choose 'mansu'"


MANSU_CLOSED = register(
    Method(
        "mansu-closed",
        "MANSU, closed form",
        MansuSettings,
        mansu,
        takes_circuit=True,
        shares=True,
        claims_floor=True,
        searched=False,
        preset=CLOSED,
        needs=mansu_needs,
        foreign=_foreign,
    )
)
