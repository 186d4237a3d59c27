"""The runner of studies and comparisons: what a folder holds is read, what is missing is computed, cell by cell.

1. Each cell's stages are looked up in the store, by keys of everything that they read.
2. What is missing is computed, by this process or by an engine; every stage is on disk as soon as it is there.
3. The table, and what is kept beside it, are read from the store.
"""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mansu_tl.errors import MansuError
from mansu_tl.results.files import write_text
from mansu_tl.results.locks import one_writer
from mansu_tl.results.store import NotMadeError, Store
from mansu_tl.study.bench import Bench
from mansu_tl.study.comparison import ComparisonResult, compared, comparison_cell
from mansu_tl.study.config import StudyConfig
from mansu_tl.study.engines import compute, engine_for, is_small, one_thread, peak_memory_gb, require_engine
from mansu_tl.study.environment import record_environment
from mansu_tl.study.plan import Cell, Comparison, Plan
from mansu_tl.study.study import PASSES, Study, assembled, study_cell
from mansu_tl.study.table import write_table

Work = Callable[[Bench, Cell], Any]


def run_study(
    config: StudyConfig,
    out: str | PathLike[str],
    *,
    progress: bool = True,
    workers: int | None = None,
    on: str = "processes",
) -> Study:
    """Run a study, or finish one that was interrupted.

    Models of less than five million parameters on the CPU are computed with one thread, several cells at the same time in
    processes of their own; the results do not depend on how many. Larger models are run one after the other.

    Args:
        progress: show progress bars.
        workers: how many cells may be computed at the same time; None = as many as there are processors.
        on: "processes" of this machine, or "ray".

    Raises:
        MansuError: another run is writing into the folder, it cannot be written to, a model that does not know what it is
            to forget, or anything the stages refuse.

    Example:
        >>> study = mtl.run_study(mtl.study.StudyConfig(methods=("mansu", "graddiff")), "runs/first")
        >>> study.summary()
    """
    folder, toml = Path(out), config.to_toml()
    require_engine(on, workers)
    with one_writer(folder):
        for _ in range(PASSES):
            write_text(folder / "config.toml", toml)
            run = _run(config, folder, study_cell, progress, workers, on)
            study = assembled(config, folder, run.done, run.environment)
            write_text(folder / "scores" / "summary.csv", study.summary().to_csv(index=False))
            write_table(study.table, folder / "scores" / "measures")
            # Against every lock (some network folders have none) another run may have come between.
            if run.intact() and (folder / "config.toml").read_text(encoding="utf-8") == toml:
                return study
    raise MansuError(f"{folder}: something else keeps writing into it; give another results folder")


def compare(
    plan: Comparison,
    out: str | PathLike[str],
    *,
    png: bool = False,
    progress: bool = True,
    workers: int | None = None,
    on: str = "processes",
) -> ComparisonResult:
    """Run a comparison, or finish one that was interrupted.

    Every edit and every measurement is kept under `out` with a key of what it was made from; the same call goes on
    where it stopped.

    Args:
        png: also write the figures as PNG (needs Chromium).
        progress: show a bar over the cells.
        workers: as `run_study`.
        on: as `run_study`.

    Raises:
        MansuError: another run is writing into the folder, a base that does not know what it is to forget, or anything
            the stages refuse.
    """
    folder = Path(out)
    require_engine(on, workers)
    with one_writer(folder):
        write_text(folder / "plan.json", json.dumps(asdict(plan), indent=2, default=str))
        run = _run(plan, folder, comparison_cell, progress, workers, on)
        return compared(plan, folder, run.done, png=png)


@dataclass(frozen=True)
class _Run:
    """What a run of a plan gave."""

    done: Mapping[Cell, Any]
    stores: Sequence[Store]
    environment: Mapping[str, Any]

    def intact(self) -> bool:
        """Whether everything that was read is still there as it was made."""
        return all(store.intact() for store in self.stores)


@dataclass(frozen=True)
class _Report:
    """What a worker says of a cell: the stages that it made, its process, and what is unknown there."""

    made: int
    process: tuple[str, int]
    peak_memory_gb: float
    unknown: str = ""


def _run(plan: Plan, folder: Path, work: Work, progress: bool, workers: int | None, on: str) -> _Run:
    started = time.perf_counter()
    done: dict[Cell, Any] = {}
    waiting: dict[Cell, Bench] = {}
    stores, threads = [], 1
    for base in plan.bases:
        bench = Bench(plan, base, folder, progress=progress)
        small = is_small(bench.model)
        # Large ones are not held side by side.
        bench.store.making = on == "processes" and (workers == 1 or not small)
        stores.append(bench.store)
        cells = [cell for cell in plan.cells if cell.base == base]
        with one_thread(small):
            threads = torch.get_num_threads()
            for cell in tqdm(cells, bench.name, unit="cell", disable=not progress or not bench.store.making):
                try:
                    done[cell] = work(bench, cell)
                except NotMadeError:
                    waiting[cell] = bench
    reports: Sequence[_Report] = ()
    if waiting:
        engine = engine_for(on, workers, len(waiting), plan.device)
        if engine is not None:
            beside = partial(_compute, plan, folder, work)
            title = partial(_title, plan)
            reports = [*compute(engine, beside, list(waiting), title=title, progress=progress).values()]
            for unknown in {report.unknown for report in reports if report.unknown}:
                warnings.warn(
                    f"{unknown}: so it is in a fresh process, and the calling one computes what needs it, cell by cell; "
                    "name the module that registers it under plugins",
                    stacklevel=3,
                )
        with one_thread():
            for cell, bench in waiting.items():
                bench.store.making = True
                done[cell] = work(bench, cell)
    made = sum(store.made for store in stores) + sum(report.made for report in reports)
    # Processes that ran side by side count in full, whether or not all were at their peak at once.
    peaks = {report.process: report.peak_memory_gb for report in reports}
    memory = peak_memory_gb() + sum(peaks.values())
    config = {key: value for key, value in asdict(plan).items() if key != "settings"}  # type: ignore[call-overload]
    environment = record_environment(
        folder / "environment.json", config, seed=plan.seed, device=plan.device, made=made,
        seconds=time.perf_counter() - started, threads=threads, memory_gb=memory,
    )  # fmt: skip
    return _Run({cell: done[cell] for cell in plan.cells}, stores, environment)


def _compute(plan: Plan, folder: Path, work: Work, cell: Cell) -> _Report:
    """One cell, in a worker: its results go to the store. What only the caller's process knows is left to that."""
    process = platform.node(), os.getpid()
    try:
        bench = _bench(plan, cell.base, folder)
    except MansuError as error:
        return _Report(0, process, peak_memory_gb(), str(error))
    before = bench.store.made
    work(bench, cell)
    return _Report(bench.store.made - before, process, peak_memory_gb())


@lru_cache(maxsize=2)
def _bench(plan: Plan, base: str, folder: Path) -> Bench:
    """A worker's bench, kept for its next cell.

    Raises:
        MansuError: what the caller registered, and does not name among the plugins.
    """
    plan.require_known()
    return Bench(plan, base, folder)


def _title(plan: Plan, cell: Cell) -> str:
    return f"{plan.names[cell.base]} {cell.place}"
