"""Where the shipped checkpoints lie and what each of them is."""

from __future__ import annotations

from pathlib import Path

from mansu_tl.errors import MansuError

CHECKPOINTS: dict[str, str] = {
    "pocket": "knows every fact; its linear weights rest on the NF4 grid, as after quantization-aware training",
    "pocket-fp": "knows every fact; ordinary weights",
    "pocket-never": "trained alike but never told the hazard facts",
}


def checkpoint_folder(name: str) -> Path:
    """The folder of a shipped checkpoint, in Hugging Face format.

    Raises:
        MansuError: no checkpoint of that name.
    """
    if name not in CHECKPOINTS:
        raise MansuError(f"checkpoint {name!r}: not one that is shipped; choose one of {', '.join(CHECKPOINTS)}")
    return Path(__file__).parent / "checkpoints" / name
