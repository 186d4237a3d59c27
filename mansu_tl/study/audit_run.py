"""The audit: did a model that anybody unlearned forget, what did it cost, and does it stay so; each with its control."""

from __future__ import annotations

import json
import shutil
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from mansu_tl.data import Task
from mansu_tl.data.sources.registry import TaskSource
from mansu_tl.errors import MansuError
from mansu_tl.results.files import write_text
from mansu_tl.results.locks import one_writer
from mansu_tl.results.result import Result, Table, bars
from mansu_tl.study.audit_inputs import ModelSource, read_inputs
from mansu_tl.study.audit_page import marked, verdict_table, write_page
from mansu_tl.study.audit_plan import AuditPlan, Clock, Estimate, Planned
from mansu_tl.study.audit_questions import verdicts
from mansu_tl.study.audit_stages import Bench, Stage, is_done, rows_of, stages
from mansu_tl.study.audit_verdicts import Answer, Evidence, Verdict, answers
from mansu_tl.study.engines import is_small, one_thread, peak_memory_gb
from mansu_tl.study.environment import record_environment
from mansu_tl.study.table import write_table
from mansu_tl.verification import CadByDepth

_PLANS = {"quick": AuditPlan.quick, "full": AuditPlan.full}
_RECORD = "audit.json"


@dataclass(frozen=True)
class Audit(Result):
    """What an audit found.

    Attributes:
        original, unlearned, never: how the models are called; never is "" where there was none.
        task: what was asked.
        verdicts: one line each, with numbers and controls.
        table: the tidy rows behind them, those of a study: base, method ("unlearned", "original", "never"), seed, quantizer,
            question_set, measure, value, low, high, control.
        cad: CAD by depth, or None where it could not be read.
        notes: why stages have no rows, by stage.
        environment: versions, duration, settings.
        folder: where everything is; None where nothing was kept.
    """

    original: str
    unlearned: str
    never: str
    task: str
    verdicts: tuple[Verdict, ...]
    table: pd.DataFrame
    cad: CadByDepth | None
    notes: Mapping[str, str]
    environment: Mapping[str, Any]
    folder: Path | None

    @property
    def answers(self) -> tuple[Answer, ...]:
        """One verdict a question."""
        return answers(self.verdicts)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a verdict."""
        return pd.DataFrame([asdict(each) for each in self.verdicts])

    def lines(self) -> list[str]:
        """For a terminal: every question with its verdict and why."""
        rows = [(each.question, marked(each.verdict), each.why) for each in self.answers]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip() for row in rows]

    def __repr__(self) -> str:
        told = "; ".join(f"{each.question} {each.verdict}" for each in self.answers)
        return f"Audit({self.unlearned} against {self.original}: {told})"

    def _tables(self) -> Sequence[Table]:
        frame = verdict_table(self.verdicts)
        frame.insert(0, "question", [each.question for each in self.verdicts])
        return (Table(frame, "verdicts", rows=len(frame)),)


class OpenAudit:
    """An audit whose inputs are read and checked: say how long it takes, then run it. It takes what `audit` takes.

    Raises:
        MansuError: as `audit`.
    """

    def __init__(
        self,
        original: ModelSource,
        unlearned: ModelSource,
        task: Task | TaskSource,
        *,
        never: ModelSource | None = None,
        formats: Sequence[str] = (),
        out: str | PathLike[str] | None = None,
        plan: str | AuditPlan = "quick",
        device: str = "cpu",
    ) -> None:
        settings = _plan(plan, formats)
        self.device = device
        self.inputs = read_inputs(original, unlearned, task, never, device)
        self.plan = settings.for_model(self.inputs.original)
        self._kept = out is not None
        self.folder = Path(mkdtemp(prefix="mansu-audit-") if out is None else out)
        if out is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._require_own_folder()

    @cached_property
    def bench(self) -> Bench:
        """What the stages are made with."""
        return Bench(self.inputs, self.plan, self.folder)

    @cached_property
    def stages(self) -> list[Stage]:
        """Everything that is to be done, in order."""
        return stages(self.bench)

    @property
    def title(self) -> str:
        """What is audited."""
        return f"audit of {self.inputs.names['unlearned']} against {self.inputs.names['original']}"

    def estimate(self) -> Estimate:
        """What is to be done and how long it takes, by timing a small piece of the work on this machine."""
        timed, planned = Clock(self.bench.original), []
        with one_thread(is_small(self.inputs.original)):
            for stage in self.stages:
                done = is_done(self.bench, stage)
                seconds = 0.0 if done else timed.seconds(stage.work)
                planned.append(Planned(stage.name, stage.what, done, seconds))
            return Estimate(self.title, tuple(planned), 1e6 * timed.forward, 1e6 * timed.backward)

    def run(self, *, progress: bool | None = None) -> Audit:
        """Do what is missing, and write tables and page; Ctrl-C loses the stage that is being made.

        Args:
            progress: show a bar over the stages; None = in notebooks.

        Raises:
            MansuError: another run is writing into the folder.
        """
        started, failed = time.perf_counter(), dict[str, str]()
        small = is_small(self.inputs.original)
        with one_writer(self.folder), one_thread(small):
            self._record()
            frames = []
            with tqdm(self.stages, "audit", unit="stage", disable=not bars(progress)) as bar:
                for stage in bar:
                    bar.set_postfix_str(stage.name)
                    try:
                        frames.append(rows_of(self.bench, stage))
                    except MansuError as error:
                        if stage is self.stages[0]:
                            raise  # nothing can be said without answers
                        # Said in the verdict that it leaves open, and tried again the next time.
                        failed[stage.name] = str(error)
            found = self._found(frames, failed, time.perf_counter() - started, 1 if small else 0)
            self._write(found)
        return found

    def _found(self, frames: Sequence[pd.DataFrame], failed: Mapping[str, str], seconds: float, threads: int) -> Audit:
        names, bench = self.inputs.names, self.bench
        rows = pd.concat(frames, ignore_index=True)
        cad = None if "depth" in failed or not self.plan.looks_at("depth") else bench.cad
        evidence = Evidence(
            rows, self.inputs.task, self.inputs.known, self.plan, failed, cad, self.inputs.never is not None
        )
        table = rows.assign(base=names["original"], seed=self.plan.seed)
        environment = record_environment(
            self.folder / "environment.json", {**names, "task": self.inputs.task.name, **asdict(self.plan)},
            seed=self.plan.seed, device=self.device, made=bench.store.made, seconds=seconds,
            threads=threads or torch.get_num_threads(), memory_gb=peak_memory_gb(),
        )  # fmt: skip
        return Audit(
            original=names["original"],
            unlearned=names["unlearned"],
            never=names.get("never", ""),
            task=self.inputs.task.name,
            verdicts=verdicts(evidence),
            table=table[["base", "method", "seed", *(name for name in rows.columns if name != "method")]],
            cad=cad,
            notes=dict(failed),
            environment=environment,
            folder=self.folder if self._kept else None,
        )

    def _write(self, found: Audit) -> None:
        if not self._kept:
            return
        write_table(found.table, self.folder / "measures")
        write_text(self.folder / "verdicts.csv", found.to_dataframe().to_csv(index=False))
        write_page(found, self.folder / "report.html")

    def _require_own_folder(self) -> None:
        """Refuse a folder that holds another audit, or anything else."""
        path = self.folder / _RECORD
        if path.is_file():
            earlier, own = json.loads(path.read_text(encoding="utf-8")), self._marks()
            for role in ("original", "unlearned", "task"):
                if earlier["marks"].get(role) != own[role]:
                    raise MansuError(
                        f"{self.folder}: holds the audit of {earlier['unlearned']} against {earlier['original']} on "
                        f"{earlier['task']}, whose {role} is another one; give another results folder"
                    )
        elif self.folder.is_dir() and any(not each.name.startswith(".") for each in self.folder.iterdir()):
            raise MansuError(f"{self.folder}: holds something that is no audit; give another results folder")

    def _marks(self) -> dict[str, str]:
        return {role: mark for role, mark in self.inputs.marks.items() if role != "never"}

    def _record(self) -> None:
        names = self.inputs.names
        record = {**{role: names[role] for role in ("original", "unlearned")}, "task": self.inputs.task.name}
        write_text(self.folder / _RECORD, json.dumps({**record, "marks": self._marks()}, indent=2))


def audit(
    original: ModelSource,
    unlearned: ModelSource,
    task: Task | TaskSource,
    *,
    never: ModelSource | None = None,
    formats: Sequence[str] = (),
    out: str | PathLike[str] | None = None,
    plan: str | AuditPlan = "quick",
    device: str = "cpu",
    progress: bool | None = None,
) -> Audit:
    """Audit a model that anybody unlearned: did it forget, what did it cost, does it stay so, is it erased or suppressed.

    Every verdict is yes, no or not judgeable, beside its control: the original in the same format, under the same attack,
    read by the same probe; near facts; a never-trained model where one is given. The numbers are those of a study's table.
    An interrupted audit goes on where it stopped when it is called with the same folder.

    Args:
        original: the model before it was unlearned: a name, a folder in HF format, a GGUF file, or a model in memory.
        unlearned: the same after it; also the folder of a LoRA adapter, which is merged into the original (needs peft).
        task: a `Task`, or what `load_task` takes.
        never: a model that never learnt the facts; without one, relearning, probes and erasure depth are not judgeable.
        formats: quantizers; those of the plan where not given.
        out: results folder: tables, page, and every stage; without one nothing is kept.
        plan: "quick" (minutes), "full" (every format, the attacks of `compare`, the circuit), or an `AuditPlan`.
        device: where models that are given by name are put.
        progress: show a bar over the stages; None = in notebooks.

    Raises:
        MansuError: models of different architecture, vocabulary or tokenizer, an unlearned model that is the original, a task
            whose facts the original does not know, an adapter that cannot be merged, an unknown format, a folder that holds
            another audit, or anything that `load` and `load_task` refuse.

    Example:
        >>> found = mtl.audit("pocket", "out/model", "pocket", never="pocket-never", out="runs/audit")
        >>> print(*found.lines(), sep="\\n")
    """
    opened = OpenAudit(
        original, unlearned, task, never=never, formats=formats, out=out, plan=plan, device=device
    )  # fmt: skip
    if bars(progress):
        tqdm.write("\n".join(opened.estimate().lines()))
    return opened.run(progress=progress)


def _plan(plan: str | AuditPlan, formats: Sequence[str]) -> AuditPlan:
    if isinstance(plan, AuditPlan):
        return replace(plan, formats=tuple(formats)) if formats else plan
    if plan not in _PLANS:
        raise MansuError(f"audit: plan {plan!r}; choose one of {', '.join(_PLANS)}, or give an AuditPlan")
    return replace(_PLANS[plan](), formats=tuple(formats))
