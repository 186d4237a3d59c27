"""What is wrong with a study before an hour is spent on it: files, pairs, knowledge, shapes, settings, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Graph
from mansu_tl.data import Task
from mansu_tl.data.sources import load_task
from mansu_tl.errors import MansuError
from mansu_tl.models import load, parameters
from mansu_tl.models.limits import free_memory
from mansu_tl.quantization import find_grid, quantize
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import accuracy
from mansu_tl.study.config import StudyConfig
from mansu_tl.unlearning import method_flags, method_title, settings_of
from mansu_tl.verification.knowledge import few_facts, require_known, unknown_facts

# Models this small are quantized once to see that it works; larger ones would take too long.
_SMALL = 50_000_000
# Weights of each matrix that are held against the grids.
_LOOKED_AT = 2**14
# Float32 numbers a weight that are held at once: original, edited and quantized model, master weights, gradients, Adam's two.
_COPIES = 7


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: it.
        state: "ok", "warning" (the study runs, its numbers may say little) or "wrong" (it would stop).
        detail: what was found, and the way out.
    """

    what: str
    state: str
    detail: str


@dataclass(frozen=True)
class Check(Result):
    """Everything that was looked at before a study."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong; warnings do not count."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """What would stop the study."""
        return tuple(finding for finding in self.findings if finding.state == "wrong")

    def lines(self) -> tuple[str, ...]:
        """One line a finding, the wrong ones last."""
        order = {"ok": 0, "warning": 1, "wrong": 2}
        return tuple(
            f"{found.state:>7}  {found.what}: {found.detail}"
            for found in sorted(self.findings, key=lambda found: order[found.state])
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a finding."""
        return pd.DataFrame([finding.__dict__ for finding in self.findings])

    def require(self) -> None:
        """Refuse to go on where something is wrong.

        Raises:
            MansuError: something is; it names every such thing.
        """
        if self.wrong:
            raise MansuError("; ".join(f"{found.what}: {found.detail}" for found in self.wrong))

    def __repr__(self) -> str:
        count = {state: sum(found.state == state for found in self.findings) for state in ("ok", "warning", "wrong")}
        return f"Check({', '.join(f'{number} {state}' for state, number in count.items())})"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), rows=len(self.findings)),)


def check_study(config: StudyConfig) -> Check:
    """Look at everything that a study needs, in seconds: every model with its task, methods, quantizers and memory."""
    findings: list[Finding] = []
    for source, name in config.names.items():
        findings += _of_model(config, source, name)
    return Check(tuple(findings))


def _of_model(config: StudyConfig, source: str, name: str) -> Iterator[Finding]:
    try:
        model = load(source, device=config.device)
    except MansuError as error:
        yield Finding(f"model {name}", "wrong", str(error))
        return
    count = sum(value.numel() for value in parameters(model).values())
    yield Finding(f"model {name}", "ok", f"{model.cfg.n_layers} layers, {count:,} parameters, {model.cfg.dtype}")
    rests = find_grid(model, rows_of=_LOOKED_AT).best
    if rests:
        what = f"it rests on {rests}: rounding to that grid gives small updates back, so floor on it or expect a gap"
        yield Finding(f"grid of {name}", "ok", what)
    try:
        task = load_task(config.task, tokenizer=model)
    except MansuError as error:
        yield Finding(f"task of {name}", "wrong", str(error))
        return
    yield Finding(f"task of {name}", "ok", repr(task))
    yield from _knowledge(model, task, name)
    yield from _reference(config, model, name)
    for method in config.methods:
        yield from _method(config, model, task, method, name)
    yield from _quantizers(config, model, task, name, count)
    yield _memory(model, name, count)


def _knowledge(model: TransformerBridge, task: Task, name: str) -> Iterator[Finding]:
    what = f"knowledge of {name}"
    try:
        answers = require_known(model, task)
    except MansuError as error:
        yield Finding(what, "wrong", str(error))
        return
    missing = unknown_facts(answers)
    numbers = f"forget MC {answers.mc_percent:.0f} %, cloze {answers.cloze_percent:.0f} %"
    if missing:
        yield Finding(what, "warning", f"{numbers}; it does not know {', '.join(missing)}")
    else:
        yield Finding(what, "ok", f"{numbers}; it knows every fact")
    for kind, asked in task.questions.items():
        if warning := few_facts(asked, kind):
            yield Finding(f"task of {name}", "warning", warning)
        if kind.startswith(("retain", "near")):
            found = accuracy(model, asked)
            if found.mc_percent <= asked.chance:
                detail = (
                    f"{kind} MC {found.mc_percent:.0f} % where guessing gives {asked.chance:.0f} %: nothing to lose"
                )
                yield Finding(what, "warning", detail)


def _reference(config: StudyConfig, model: TransformerBridge, name: str) -> Iterator[Finding]:
    if not config.never:
        return
    what = f"never, {config.never}"
    try:
        never = load(config.never, device=config.device)
    except MansuError as error:
        yield Finding(what, "wrong", str(error))
        return
    graph, other = Graph.of(model), Graph.of(never)
    if (graph.writers, graph.readers) != (other.writers, other.readers) or model.cfg.d_vocab != never.cfg.d_vocab:
        yield Finding(what, "wrong", f"its heads, layers or vocabulary are not those of {name}; use one of its shape")
    else:
        yield Finding(what, "ok", f"of the shape of {name}")


def _method(config: StudyConfig, model: TransformerBridge, task: Task, method: str, name: str) -> Iterator[Finding]:
    what = f"{method_title(method)} on {name}"
    try:
        settings = settings_of(method, dict(config.settings.get(method, {})))
        found = list(method_flags(method).needs(model, task, settings))
    except MansuError as error:
        found = [("wrong", str(error))]
    if found:
        yield from (Finding(what, state, detail) for state, detail in found)
    else:
        yield Finding(what, "ok", "its settings fit model and task")


def _quantizers(config: StudyConfig, model: TransformerBridge, task: Task, name: str, count: int) -> Iterator[Finding]:
    if count > _SMALL:
        return
    for quantizer in config.quantizers:
        what = f"{quantizer} on {name}"
        try:
            deployed = accuracy(quantize(model, quantizer, task.retain_text), task.questions["forget"])
        except MansuError as error:
            yield Finding(what, "wrong", str(error))
            continue
        before = accuracy(model, task.questions["forget"])
        lost = before.mc_percent - deployed.mc_percent
        if lost > 10:
            yield Finding(
                what, "warning", f"it alone loses {lost:.0f} points of forget MC: nothing can be judged under it"
            )
        else:
            yield Finding(what, "ok", f"forget MC {deployed.mc_percent:.0f} % before any edit")


def _memory(model: TransformerBridge, name: str, count: int) -> Finding:
    need = 4 * _COPIES * count / 1e9
    device = next(model.original_model.parameters()).device
    free = free_memory(device)
    numbers = f"about {need:.2g} GB for the weights of all stages, {free / 1e9:.2g} GB are free"
    return Finding(f"memory for {name}", "ok" if need < free / 1e9 else "warning", numbers)
