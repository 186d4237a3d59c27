"""MANSU: circuit, null space, Fisher information, floor and attacker; `mansu_tl.unlearning.mansu` is its machinery."""

from __future__ import annotations

from mansu_tl.unlearning.mansu.plan import mansu_needs
from mansu_tl.unlearning.mansu.settings import MansuSettings
from mansu_tl.unlearning.mansu.solver import mansu
from mansu_tl.unlearning.registry import Method, register

MANSU = register(
    Method(
        "mansu",
        "MANSU",
        MansuSettings,
        mansu,
        takes_circuit=True,
        shares=True,
        claims_floor=True,
        searched=False,
        ablations={
            "no-circuit": ("MANSU, no circuit", {"restrict": "none"}),
            "no-null-space": ("MANSU, no null space", {"null_space": 0.0}),
            "no-fisher": ("MANSU, no Fisher", {"fisher": False}),
            "no-floor": ("MANSU, no floor", {"floor": "none"}),
            "floor-after": ("MANSU, floor after the fact", {"floor": "after"}),
            "no-adversary": ("MANSU, no adversary", {"adversary_weight": 0.0}),
            "one-percent": ("MANSU, 1 % of the weights", {"budget": 0.0099}),
        },
        needs=mansu_needs,
    )
)
