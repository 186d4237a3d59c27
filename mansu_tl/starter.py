"""A first task and config to run and to change: some of the embedded model's facts, as a user would write them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from mansu_tl.errors import MansuError
from mansu_tl.results.files import write_text


def write_starter(folder: Path) -> tuple[Path, Path]:
    """Write `task.jsonl` and `config.toml` into a folder; together they run as they stand.

    The task asks facts of the embedded model "pocket": twelve to forget in two wordings and a held-out one, neighbours and
    far facts to keep, text whose likelihood is to be kept, and prompts about things that the model never met.

    Returns:
        The config and the task.

    Raises:
        MansuError: one of the files is there already, or the folder cannot be written to.
    """
    paths = folder / "config.toml", folder / "task.jsonl"
    for path in paths:
        if path.exists():
            raise MansuError(f"{path}: is there already; give another folder, or move it away")
    for path in paths:
        write_text(path, (resources.files("mansu_tl.data") / "starter" / path.name).read_text(encoding="utf-8"))
    return paths
