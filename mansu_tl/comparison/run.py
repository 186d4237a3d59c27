"""The run: edits, measurements and tables, each on disk as soon as it is there."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from mansu_tl.circuit import Circuit, discover_circuit
from mansu_tl.comparison.figures import figures, write_figures
from mansu_tl.comparison.markdown import markdown
from mansu_tl.comparison.measure import NEVER, Ground, measure, measure_base, measure_never
from mansu_tl.comparison.plan import Comparison, Job
from mansu_tl.comparison.tables import properties, summary
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint
from mansu_tl.results.files import write_text, write_whole
from mansu_tl.results.locks import held, one_writer, waiting_writer
from mansu_tl.results.result import Result, Table
from mansu_tl.results.store import Store
from mansu_tl.unlearning import Edit, method_flags, settings_of, unlearn
from mansu_tl.unlearning.search import Search, search
from mansu_tl.verification import require_known

_PACKAGES = ("mansu-tl", "torch", "transformers", "transformer-lens", "bitsandbytes")


@dataclass(frozen=True)
class ComparisonResult(Result):
    """What a comparison found.

    Attributes:
        folder: where everything is.
        table: one row a base, method, seed, quantizer and measure.
        searches: one row a base, method and learning rate.
    """

    folder: Path
    table: pd.DataFrame
    searches: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """The tidy table."""
        return self.table

    def __repr__(self) -> str:
        return f"ComparisonResult({self.folder}: {len(self.table)} measurements, {len(self.searches)} learning rates tried)"

    def _tables(self) -> Sequence[Table]:
        return (Table(properties(self.table), rows=60),)


def compare(
    plan: Comparison,
    out: str | PathLike[str],
    *,
    part: tuple[int, int] = (1, 1),
    png: bool = False,
    progress: bool = True,
) -> ComparisonResult:
    """Run a comparison, or finish one that was interrupted.

    Every edit and every measurement is kept under `out` with a key of what it was made from; the same call goes on
    where it stopped. Several processes may share the work: start each with its own `part`, then once more without.

    Args:
        part: (i, n): this process's share of the edits, 1 <= i <= n.
        png: also write the figures as PNG (needs Chromium).
        progress: show a bar over the edits.

    Raises:
        MansuError: a part outside 1..n, another process that has this part or runs another plan in the folder, a base that
            does not know what it is to forget, or anything the stages refuse.
    """
    i, n = part
    if not 1 <= i <= n:
        raise MansuError(f"compare: part {i}/{n}; choose one of 1/{n} to {n}/{n}")
    folder = Path(out)
    with one_writer(folder, f"part-{i}-of-{n}"):
        _join(plan, folder, f"part-{i}-of-{n}")
        return _compared(plan, folder, part, png, progress)


def _join(plan: Comparison, folder: Path, own: str) -> None:
    """Write the plan, unless other parts are at work on another one."""
    record, written = folder / "plan.json", json.dumps(asdict(plan), indent=2, default=str)
    with waiting_writer(folder, "plan"):
        if record.is_file() and record.read_text(encoding="utf-8") != written:
            busy = [name for name in held(folder, "part-*") if name != own]
            if busy:
                raise MansuError(
                    f"{folder}: {', '.join(busy)} of another plan is at work there; wait until it is done, or give another "
                    "results folder"
                )
        write_text(record, written)


def _compared(plan: Comparison, folder: Path, part: tuple[int, int], png: bool, progress: bool) -> ComparisonResult:
    i, n = part
    started = time.perf_counter()
    mine = [job for k, job in enumerate(plan.jobs) if k % n == i - 1]
    frames: list[pd.DataFrame] = []
    found: list[pd.DataFrame] = []
    made = 0
    with tqdm(total=len(mine), desc=f"compare {i}/{n}", unit="edit", disable=not progress) as bar:
        for base in plan.bases:
            jobs = [job for job in mine if job.base == base]
            if not jobs:
                continue
            runner = _Runner(plan, base, folder)
            if (i, n) == (1, 1):
                frames += runner.controls()
            for job in jobs:
                bar.set_postfix_str(f"{runner.name} {job.name}")
                frames.append(runner.measured(job))
                bar.update()
            found += runner.found
            made += runner.stages.made
    _record(folder, time.perf_counter() - started, made, part)
    # A share of few edits may hold none.
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    searches = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    if (i, n) == (1, 1):
        _write_tables(folder, table, searches)
        drawn = figures(table)
        write_figures(drawn, folder / "figures")
        if png:
            write_figures(drawn, folder / "figures", png=True)
    return ComparisonResult(folder, table, searches)


class _Runner:
    """The jobs of one base."""

    def __init__(self, plan: Comparison, base: str, folder: Path) -> None:
        self.plan, self.base, self.name = plan, base, plan.names[base]
        self.ground = Ground(plan, base)
        require_known(self.ground.model, self.ground.task)
        self.stages = Store(folder / "jobs" / self.name, shared=True)
        self.model = {"model": fingerprint(self.ground.model)}
        # What every measurement reads.
        self.asked = {
            **self.model,
            "task": self.ground.task.digest(),
            "attack": [plan.attack_rates, plan.attack_steps, plan.attack_splits, plan.attack_seed],
            "never": fingerprint(self.ground.never) if plan.never else "",
        }
        self.found: list[pd.DataFrame] = []
        self._searched: set[str] = set()

    @cached_property
    def circuit(self) -> Circuit:
        """The base's forget circuit, from disk where it is there."""
        pairs = self.ground.task.forget_pairs
        key = {**self.model, "pairs": pairs.digest()}
        found: Circuit = self.stages.result("circuit", Circuit, key, lambda: discover_circuit(self.ground.model, pairs))
        self.ground.circuit = found
        return found

    def controls(self) -> list[pd.DataFrame]:
        """The un-edited base and the never-trained model, as methods of their own."""
        names, key = self.plan.quantizers, {**self.asked, "circuit": self.circuit.digest()}
        frame = self.stages.table(
            "original/measures", {**key, "quantizers": names}, lambda: measure_base(self.ground, names)
        )
        out = [self._named(frame, Job(self.base, "original", 0))]
        if self.plan.never:
            frame = self.stages.table("never/measures", key, lambda: measure_never(self.ground))
            out.append(self._named(frame, Job(self.base, NEVER, 0)))
        return out

    def measured(self, job: Job) -> pd.DataFrame:
        """One edit and everything measured about it."""
        method, settings = self.plan.settings_for(job.method)
        flags, circuit = method_flags(method), self.circuit.digest()
        if flags.searched and self.plan.rates:
            settings = {"learning_rate": self._best_rate(method, settings), **settings}
        key = {
            **self.model,
            "method": method,
            "settings": settings_of(method, settings).digest(),
            "task": self.asked["task"],
            "circuit": circuit if flags.takes_circuit else "",
            "seed": job.seed,
        }
        names = self.plan.quantizers_of(job.method)
        evidence = self.plan.evidence and job.seed == min(self.plan.seeds)
        edit: Edit | None = None

        def made() -> Edit:
            nonlocal edit
            if edit is None:
                edit = self.stages.result(f"{job.name}/edit", Edit, key, lambda: self._unlearn(method, job, settings))
            return edit

        started = time.perf_counter()
        frame = self.stages.table(
            f"{job.name}/measures",
            {"edit": key, **self.asked, "circuit": circuit, "quantizers": names, "evidence": evidence},
            lambda: self._with_seconds(measure(self.ground, made(), names, evidence=evidence), started),
        )
        return self._named(frame, job)

    def _with_seconds(self, frame: pd.DataFrame, started: float) -> pd.DataFrame:
        row = {"quantizer": "", "measure": "seconds, with all measuring", "value": time.perf_counter() - started}
        return pd.concat([frame, pd.DataFrame([row])], ignore_index=True)

    def _unlearn(self, method: str, job: Job, settings: dict[str, Any]) -> Edit:
        ground = self.ground
        return unlearn(
            ground.model,
            ground.task,
            method,
            circuit=self.circuit,
            seed=job.seed,
            progress=False,
            checkpoint=self.stages.folder / f"{job.name}/checkpoint.safetensors",
            **settings,
        )

    def _best_rate(self, method: str, settings: dict[str, Any]) -> float:
        validation = self.ground.validation
        result: Search = self.stages.result(
            f"{method}/search",
            Search,
            {
                **self.model,
                "validation": validation.digest(),
                "circuit": self.circuit.digest() if method_flags(method).takes_circuit else "",
                "rates": self.plan.rates,
                "settings": settings_of(method, settings).digest(),
            },
            lambda: search(
                self.ground.model, validation, method, rates=self.plan.rates, circuit=self.circuit, **settings
            ),
        )
        if method not in self._searched:
            self._searched.add(method)
            frame = result.to_dataframe()
            frame.insert(0, "base", self.name)
            self.found.append(frame)
        return result.best.rate

    def _named(self, frame: pd.DataFrame, job: Job) -> pd.DataFrame:
        named = frame.copy()
        named.insert(0, "base", self.name)
        named.insert(1, "method", job.method)
        named.insert(2, "seed", job.seed)
        return named


def _write_tables(folder: Path, table: pd.DataFrame, searches: pd.DataFrame) -> None:
    wide = {"measures": table, "searches": searches, "summary": summary(table), "properties": properties(table)}
    for name, frame in wide.items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=False))
        # One quantizer column of text, the rest numbers: parquet keeps the types that CSV loses.
        write_whole(folder / f"{name}.parquet", lambda path, frame=frame: frame.to_parquet(path, index=False))  # type: ignore[misc]
    write_text(folder / "tables.md", markdown(table, searches))


def _record(folder: Path, seconds: float, made: int, part: tuple[int, int]) -> None:
    """Versions and time, one line a process that did something."""
    record = folder / "environment.json"
    lines = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
    if made:
        versions = {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}
        lines.append(
            {
                "part": f"{part[0]}/{part[1]}",
                "seconds": round(seconds, 1),
                "stages": made,
                "threads": torch.get_num_threads(),
                "versions": versions,
            }
        )
    write_text(record, json.dumps(lines, indent=2))
