"""MANSU's control: as many heads and neurons as its circuit has, drawn from the whole model."""

from __future__ import annotations

from dataclasses import replace

from mansu_tl.unlearning.recipes.mansu import MANSU
from mansu_tl.unlearning.registry import register

register(
    replace(
        MANSU,
        name="random-circuit",
        title="Random-circuit MANSU",
        preset={"restrict": "random"},
        control_of="mansu",
        ablations={},
    )
)
