"""A study: the whole road on one model and those beside it, as results that are kept beside the tidy table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, EdgeScores, random_faithfulness
from mansu_tl.data import PromptPairs
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint, gguf_weights, save, save_gguf
from mansu_tl.patching import PatchingResult, activation_patching
from mansu_tl.quantization import UpdateStatistics, update_statistics
from mansu_tl.results.files import write_text
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import logit_difference
from mansu_tl.study.bench import Bench
from mansu_tl.study.config import StudyConfig
from mansu_tl.study.plan import NEVER, ORIGINAL, Cell
from mansu_tl.unlearning import Edit, method_flags, method_title
from mansu_tl.verification import (
    CadByDepth,
    Certificate,
    CircuitScores,
    Divergence,
    Scorecard,
    Subject,
    certify_in_fresh_process,
    circuit_divergence,
    circuit_scores,
    judge,
    output_suppressor,
)
from mansu_tl.verification.cad_by_depth import CAD
from mansu_tl.verification.saved_model import SavedModel

_PENALTY = 20.0
_PAIRS = 48
# Passes over a folder that something else writes into, against every lock, before it is given up.
PASSES = 3


@dataclass(frozen=True)
class MethodResult(Result):
    """What one method did to one model.

    Attributes:
        edit: the change.
        table: its tidy rows.
        card: its scorecard.
        divergences: CAD in full precision ("" ) and under every quantizer.
        depths: CAD by depth, likewise; none where the task's near questions do not allow it.
        statistics: what the edit does to the codes of the first quantizer.
        certificate: of the saved model, for methods whose edits claim the floor; else None.
        folder: where the edited model was saved, or None.
    """

    edit: Edit
    table: pd.DataFrame
    card: Scorecard
    divergences: Mapping[str, Divergence]
    depths: Mapping[str, CadByDepth]
    statistics: UpdateStatistics
    certificate: Certificate | None
    folder: Path | None

    def __repr__(self) -> str:
        cad = ", ".join(f"{name or 'full precision'} {value.value:.2f}" for name, value in self.divergences.items())
        passed = sum(row.passed for row in self.card.rows)
        return f"MethodResult({self.edit.method}: {passed} of {len(self.card.rows)} rows pass; CAD {cad})"

    def _tables(self) -> Sequence[Table]:
        return self.card._tables()


@dataclass(frozen=True)
class Study(Result):
    """Everything that a study found on one model.

    Attributes:
        config: what was asked for.
        name: how its model is called: the last part of its path, longer where others end alike.
        folder: where the results are.
        scores: edge scores on the forget pairs.
        circuit: the forget circuit.
        random_faithfulness: faithfulness of random circuits of the same size.
        patching: denoising sweep over the residual stream.
        results: per method.
        references: CAD of the un-edited model quantized, of the output filter, and of the never-trained model.
        also: studies of further models, by name.
        environment: versions, seed, device, durations.
        table: one row a model, method, quantizer, question set and measure, those of `also` included.
    """

    config: StudyConfig
    name: str
    folder: Path
    scores: EdgeScores
    circuit: Circuit
    random_faithfulness: list[float]
    patching: PatchingResult
    results: Mapping[str, MethodResult]
    references: Mapping[str, Divergence]
    also: Mapping[str, Study]
    environment: Mapping[str, Any]
    table: pd.DataFrame

    @property
    def every(self) -> Mapping[str, Study]:
        """This study and those of further models, by model."""
        return {self.name: self, **self.also}

    @property
    def chance(self) -> float:
        """What guessing gives on the forget questions, in percent."""
        return forget_chance(next(iter(self.results.values())).card)

    def summary(self) -> pd.DataFrame:
        """One row a model, method and quantizer: forget accuracy before and after quantization, retention, CAD, and the
        verdict of CAD by depth before and after."""
        return pd.DataFrame(
            [
                _summary_row(name, method, quantizer, result)
                for name, study in self.every.items()
                for method, result in study.results.items()
                for quantizer in self.config.quantizers
            ]
        )

    def to_dataframe(self) -> pd.DataFrame:
        """The tidy table."""
        return self.table

    def __repr__(self) -> str:
        return f"Study({self.folder}: {', '.join(self.results)} on {', '.join(self.every)})"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.summary(), form="{:.2f}".format, rows=24),)


def forget_chance(card: Scorecard) -> float:
    """What guessing gives on the forget questions, in percent."""
    return next(row.chance for row in card.rows if row.measure == "forget MC, %" and row.chance is not None)


def _summary_row(model: str, method: str, quantizer: str, result: MethodResult) -> dict[str, Any]:
    card, total, cad = result.card, result.statistics.to_dataframe().iloc[-1], result.divergences[quantizer]
    row: dict[str, Any] = {"model": model, "method": method, "quantizer": quantizer}
    for kind in ("MC", "cloze"):
        row[f"forget_{kind}"] = card.value(f"forget {kind}, %")
        row[f"forget_{kind}_{quantizer}"] = card.value(f"forget {kind}, %", quantizer)
    measured = {line.measure for line in card.rows}
    for name in ("retain", "near"):
        if (measure := f"{name} cloze drop, points") in measured:
            row[f"{name}_drop"] = card.value(measure)
    row |= {"CAD": cad.value, "CAD_low": cad.interval[0], "CAD_high": cad.interval[1]}
    if result.depths:
        row |= {
            "structure": result.depths[""].verdict().name,
            f"structure_{quantizer}": result.depths[quantizer].verdict().name,
        }
    return row | {
        "weights_changed": int(total.changed), "codes_changed": int(total.codes_changed), "passed": card.passed,
    }  # fmt: skip


@dataclass(frozen=True)
class BaseResult:
    """What a study keeps of the model itself."""

    scores: EdgeScores
    circuit: Circuit
    random_faithfulness: list[float]
    patching: PatchingResult
    references: Mapping[str, Divergence]


def study_cell(bench: Bench, cell: Cell) -> tuple[pd.DataFrame, BaseResult | MethodResult | None]:
    """One cell of a study: its tidy rows, and what is kept beside them."""
    if cell.method == NEVER:
        return bench.table(cell), None
    if cell.method == ORIGINAL:
        kept = BaseResult(bench.scores, bench.circuit, *_circuit_and_sweep(bench), _references(bench, cell.seed))
        return bench.table(cell), kept
    result = _method(bench, cell)
    return result.table, result


def _circuit_and_sweep(bench: Bench) -> tuple[list[float], PatchingResult]:
    pairs, marks = bench.task.forget_pairs, {"model": bench.marks["model"], "pairs": bench.task.forget_pairs.digest()}
    random = bench.store.value(
        "circuit/random",
        {**marks, "circuit": bench.circuit.digest()},
        lambda: random_faithfulness(bench.model, bench.circuit, pairs),
    )
    alike, words = in_one_wording(bench.model, pairs, subject="subject")
    patching = bench.store.result(
        "circuit/patching",
        PatchingResult,
        {**marks, "words": words},
        lambda: activation_patching(bench.model, alike, tokens=words),
    )
    return random, patching


def in_one_wording(model: TransformerBridge, pairs: PromptPairs, subject: str = "") -> tuple[PromptPairs, list[str]]:
    """Some pairs of the commonest wording, so that positions mean something, and the words of the first.

    Args:
        subject: what stands for each word that differs between pairs; the first pair's own where not given.
    """
    alike, constant = pairs.one_wording()
    words = [model.tokenizer.decode([token]).strip() for token in alike.clean[0].tolist()]
    shown = [
        word or "_" if same else f"({subject or word})" for word, same in zip(words, constant.tolist(), strict=True)
    ]
    return alike[slice(0, _PAIRS)], shown


def _references(bench: Bench, seed: int) -> dict[str, Divergence]:
    """CAD of the un-edited model quantized, of the output filter, and of the never-trained model."""
    original, config, out = bench.original, bench.plan, dict[str, Divergence]()
    pairs, steps = bench.task.forget_pairs, config.steps
    behind = output_suppressor(logit_difference, _PENALTY)

    def add(name: str, title: str, extra: Mapping[str, Any], other: Callable[[], CircuitScores]) -> None:
        key = {**bench.marks, "steps": steps, "seed": seed, "title": title, **extra}
        out[title] = bench.store.result(
            f"scores/references/{name}",
            Divergence,
            key,
            lambda: circuit_divergence(original.scores(), other(), bench.circuit, pairs, label=title, seed=seed),
        )

    def filtered(quantizer: str) -> CircuitScores:
        return circuit_scores(original.under(quantizer), bench.circuit, pairs, steps=steps, metric=behind)

    for name in config.quantizers_of(ORIGINAL):
        add(f"noise_{name}", f"un-edited, {name} (noise floor)", {}, partial(original.scores, name))
        add(f"filter_{name}", f"output filter, {name}", {"penalty": _PENALTY}, partial(filtered, name))
    if config.never:
        other = partial(circuit_scores, bench.never, bench.circuit, pairs, steps=steps)
        add("never", "never trained on it", {"never": fingerprint(bench.never)}, other)
    return out


def _method(bench: Bench, cell: Cell) -> MethodResult:
    """One method's edit and everything measured about it."""
    store, method, names = bench.store, cell.method, bench.plan.quantizers_of(cell.method)
    edit = bench.edit(cell)
    mark = {**bench.marks, "edit": edit.digest(), "seed": cell.seed}

    @cache
    def edited() -> Subject:
        return bench.subject(edit.apply(bench.model))

    table = bench.table(cell, edited, edit=mark["edit"])
    title = f"{method_title(method)} on {bench.name}"
    card = store.result(
        f"scores/{cell.place}/scorecard",
        Scorecard,
        {**mark, "quantizers": names, "steps": bench.plan.steps, "title": title},
        lambda: judge(table, bench.task, bench.known, title=title),
    )
    divergences = {}
    for name in ("", *names):
        label = f"{method_title(method)}, {name or 'full precision'}"
        divergences[name] = store.result(
            f"scores/{cell.place}/cad_{name or 'full'}",
            Divergence,
            {**mark, "quantizer": name, "steps": bench.plan.steps, "label": label},
            lambda name=name, label=label: edited().divergence(bench.original, name, label=label, seed=cell.seed),  # type: ignore[misc]
        )
    depths = _by_depth(bench, cell, edited, mark) if CAD in set(table["measure"]) else {}
    statistics = store.result(
        f"scores/{cell.place}/updates",
        UpdateStatistics,
        {**mark, "quantizer": names[0]},
        lambda: update_statistics(bench.model, edited().model, names[0]),
    )
    certificate, saved = None, None
    if method_flags(method).claims_floor:
        saved = store.folder / "model" / cell.place
        certificate = store.result(
            f"edits/{cell.place}/certificate", Certificate, mark, lambda: _certified(bench, edited(), edit, saved)
        )
    if store.making:
        for name, frame in (("scorecard", card.to_dataframe()), ("updates", statistics.to_dataframe())):
            write_text(store.folder / f"scores/{cell.place}/{name}.csv", frame.to_csv(index=False))
    return MethodResult(edit, table, card, divergences, depths, statistics, certificate, saved)


def _by_depth(
    bench: Bench, cell: Cell, edited: Callable[[], Subject], mark: Mapping[str, Any]
) -> dict[str, CadByDepth]:
    """CAD by depth in full precision and under every quantizer."""

    def read(name: str, label: str) -> CadByDepth:
        found = edited().depth(bench.original, name, label=label)
        assert found is not None
        return found

    out = {}
    for name in ("", *bench.plan.quantizers_of(cell.method)):
        label = f"{method_title(cell.method)}, {name or 'full precision'}"
        out[name] = bench.store.result(
            f"scores/{cell.place}/depth_{name or 'full'}",
            CadByDepth,
            {**mark, "quantizer": name, "steps": bench.plan.steps, "label": label},
            partial(read, name, label),
        )
    return out


def _certified(bench: Bench, edited: Subject, edit: Edit, saved: Path) -> Certificate:
    original = bench.store.folder / "model" / "original"
    grid = edit.facts["settings"]["quantizer"].split("+")[0]
    came_from = gguf_weights(bench.model)
    if grid == "gguf" and came_from is not None:
        # The report looks at matrices of both folders.
        save(bench.model, original)
        save(edited.model, saved)
        file = save_gguf(edited.model, saved.with_name(f"{saved.name}.gguf"))
        return certify_in_fresh_process(came_from.file.path, file, edit.indices)
    for _ in range(PASSES):
        save(bench.model, original)
        save(edited.model, saved)
        written = [SavedModel(folder).digest() for folder in (original, saved)]
        certificate = certify_in_fresh_process(original, saved, edit.indices, quantizer=grid)
        read = [certificate.original_digest, certificate.edited_digest]
        if written == read == [SavedModel(folder).digest() for folder in (original, saved)]:
            return certificate
    raise MansuError(f"{saved}: something else keeps writing into it; give another results folder")


def assembled(
    config: StudyConfig, folder: Path, done: Mapping[Cell, tuple[pd.DataFrame, Any]], environment: Mapping[str, Any]
) -> Study:
    """The study of the first model, with those of the others in `also`."""

    def one(base: str, bases: Sequence[str], also: Mapping[str, Study]) -> Study:
        kept = {cell.method: result for cell, (_, result) in done.items() if cell.base == base}
        whole: BaseResult = kept[ORIGINAL]
        return Study(
            config=config if base == config.model else replace(config, model=base, also=()),
            name=config.names[base],
            folder=folder / config.folder_of(base),
            scores=whole.scores,
            circuit=whole.circuit,
            random_faithfulness=whole.random_faithfulness,
            patching=whole.patching,
            results={method: kept[method] for method in config.methods},
            references=whole.references,
            also=also,
            environment=environment if base == config.model else {},
            table=pd.concat([rows for cell, (rows, _) in done.items() if cell.base in bases], ignore_index=True),
        )

    also = {config.names[base]: one(base, (base,), {}) for base in config.also}
    return one(config.model, config.bases, also)
