"""The explorer of a results folder: what `mansu-tl demo`, `demo-real` or `run` wrote, read and not written to."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from mansu_tl.circuit import Circuit, EdgeScores
from mansu_tl.data.sources import load_task
from mansu_tl.errors import MansuError
from mansu_tl.explorer.explorer import Explorer
from mansu_tl.models import load
from mansu_tl.results.result import Result
from mansu_tl.study import StudyConfig
from mansu_tl.study.collect import config_in
from mansu_tl.unlearning import Edit
from mansu_tl.verification import CadByDepth, Divergence
from mansu_tl.verification.divergence import JudgedDivergence

R = TypeVar("R", bound=Result)


def open_results(folder: str | PathLike[str]) -> Explorer:
    """The explorer of a finished results folder; nothing that it holds is computed again.

    CAD by depth is shown of every such result that lies anywhere under its `scores`.

    Raises:
        MansuError: no results folder, a run that is not finished, or a model or task that can no longer be loaded or has
            changed since.
    """
    at = Path(folder)
    config = StudyConfig.read(config_in(at))
    # What is missing is said before a model is loaded.
    scores, circuit = _read(EdgeScores, at, "circuit/scores"), _read(Circuit, at, "circuit/circuit")
    cells = [cell for cell in config.cells if cell.base == config.model and cell.method in config.methods]
    edits = {cell.method: _read(Edit, at, f"edits/{cell.place}/edit") for cell in cells}
    known = {
        (cell.method, name): _read(Divergence, at, f"scores/{cell.place}/cad_{name or 'full'}")
        for cell in cells
        for name in ("", *config.quantizers)
    }
    model = load(config.model, device=config.device)
    return Explorer(
        model,
        load_task(_task(config.task, at), tokenizer=model),
        edits,
        quantizers=config.quantizers,
        scores=scores,
        circuit=circuit,
        steps=config.steps,
        depth=_by_depth(at / "scores"),
        divergences=known,
    )


def _read(kind: type[R], folder: Path, name: str) -> R:
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise MansuError(
            f"{folder}: no {name}.safetensors in it, so its run is not finished; finish it, then explore it"
        )
    return kind.load(path)


def _task(task: str, folder: Path) -> str:
    """The task, or the file of its name in the folder where its path leads nowhere from here."""
    beside = folder / Path(task).name
    return str(beside) if not Path(task).exists() and beside.is_file() else task


def _by_depth(folder: Path) -> list[CadByDepth]:
    """Every CAD by depth under a folder."""
    out = []
    for path in sorted(folder.rglob("*.safetensors")):
        kind = _kind(path)
        if kind == CadByDepth.__name__:
            out.append(CadByDepth.load(path))
        elif kind == JudgedDivergence.__name__:
            out.append(JudgedDivergence.load(path).by_depth)
    return out


def _kind(path: Path) -> str:
    """What a result file holds, from its header alone; "" for a file of something else."""
    try:
        with safe_open(path, framework="pt") as file:
            return str(json.loads((file.metadata() or {}).get("record", "{}")).get("mansu_tl", ""))
    except (SafetensorError, ValueError):
        return ""
