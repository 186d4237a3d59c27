"""The whole road as one resumable run: circuit, edits, models, certificates, scores, all in one results folder.

Each stage writes its results when it is done, with a key of everything it read; a later run with the same key reads them
back instead. One run at a time writes into a folder. A study may name further models (`also`) on which the same methods
and questions are run.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, EdgeScores, discover_circuit, edge_attribution, random_faithfulness
from mansu_tl.config import StudyConfig
from mansu_tl.data import PromptPairs, Task
from mansu_tl.data.sources import load_task
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint, load, save
from mansu_tl.names import short_names
from mansu_tl.patching import PatchingResult, activation_patching
from mansu_tl.processes import Job, Processes, StageBar, cores, is_small, one_thread
from mansu_tl.quantization import UpdateStatistics, update_statistics
from mansu_tl.results.files import write_text
from mansu_tl.results.locks import one_writer
from mansu_tl.results.result import Result, Table
from mansu_tl.results.store import Store
from mansu_tl.runs.metrics import Metric, logit_difference
from mansu_tl.unlearning import Edit, method_flags, method_title, settings_of, unlearn
from mansu_tl.verification import (
    Certificate,
    CircuitScores,
    Divergence,
    Scorecard,
    certify_in_fresh_process,
    circuit_divergence,
    circuit_scores,
    output_suppressor,
    require_known,
    scorecard,
)
from mansu_tl.verification.controls import Controls, under
from mansu_tl.verification.saved_model import SavedModel

_PACKAGES = ("mansu-tl", "torch", "transformers", "transformer-lens", "bitsandbytes", "safetensors", "plotly")
_PENALTY = 20.0
# Passes over a folder that something else writes into, against every lock, before it is given up.
_PASSES = 3


@dataclass(frozen=True)
class MethodResult(Result):
    """What one method did to one model.

    Attributes:
        edit: the change.
        card: its scorecard.
        divergences: CAD in full precision ("" ) and under every quantizer.
        statistics: what the edit does to the codes of the first quantizer.
        certificate: of the saved model, for methods whose edits claim the floor; else None.
        folder: where the edited model was saved, or None.
    """

    edit: Edit
    card: Scorecard
    divergences: Mapping[str, Divergence]
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
        references: CAD of the un-edited model quantized, of the output suppressor, and of the never-trained model.
        also: studies of further models, by name.
        environment: versions, seed, device, durations.
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

    def summary(self) -> pd.DataFrame:
        """One row a model, method and quantizer: forget accuracy before and after quantization, retention, CAD."""
        rows = []
        for study in (self, *self.also.values()):
            for method, result in study.results.items():
                for q in study.config.quantizers:
                    rows.append(_summary_row(study.name, method, q, result))
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"Study({self.folder}: {', '.join(self.results)} on {', '.join([self.name, *self.also])})"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.summary(), form="{:.2f}".format, rows=24),)


def run_study(
    config: StudyConfig, out: str | PathLike[str], *, progress: bool = True, workers: int | None = None
) -> Study:
    """Run a study, or finish one that was interrupted.

    A model of less than five million parameters on the CPU is computed with one thread, and the models of `also` in
    processes beside it; the results do not depend on how many. Larger models are run one after the other.

    Args:
        progress: show progress bars.
        workers: how many small models may be run at the same time; None = as many as there are processors.

    Raises:
        MansuError: another run is writing into the folder, it cannot be written to, a model that does not know what it is
            to forget, or anything the stages refuse.

    Example:
        >>> study = mtl.run_study(mtl.StudyConfig(methods=("mansu", "graddiff")), "runs/first")
        >>> study.summary()
    """
    if workers is not None and workers < 1:
        raise MansuError(f"run_study: workers={workers}; choose at least 1")
    folder = Path(out)
    with one_writer(folder):
        for _ in range(_PASSES):
            study, intact = _pass(config, folder, progress, workers or cores())
            if intact:
                return study
    raise MansuError(f"{folder}: something else keeps writing into it; give another results folder")


def _pass(config: StudyConfig, folder: Path, progress: bool, workers: int) -> tuple[Study, bool]:
    """The whole study, what is there read back; and whether the folder still holds it at the end."""
    written = config.to_toml()
    write_text(folder / "config.toml", written)
    started, record = time.perf_counter(), folder / "environment.json"
    names = short_names((config.model, *config.also), "config: model and also")
    own = Job(names[config.model], folder, config)
    jobs = [
        Job(names[source], folder / "also" / names[source], replace(config, model=source, also=()))
        for source in config.also
    ]
    for job in jobs:
        write_text(job.folder / "config.toml", job.config.to_toml())
    model = load(config.model)
    small = is_small(model)
    with one_thread(small):
        with Processes(jobs, workers - 1 if small else 0, progress) as others:
            found = {own: run_model(own, StageBar(own, progress, others.check), model)}
            while (mine := others.claim()) is not None:
                with one_writer(mine.folder):
                    found[mine] = run_model(mine, StageBar(mine, progress, others.check))
            others.wait()
        # What the processes did is read from their folders.
        found |= {job: run_model(job, StageBar(job, False)) for job in jobs if job not in found}
        made = others.made + sum(stages.made for _, stages in found.values())
        seconds = time.perf_counter() - started
        earlier = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        environment = earlier if earlier and not made else _environment(config, seconds, earlier, others.peak_memory_gb)
    write_text(record, json.dumps(environment, indent=2))
    done = replace(found[own][0], also={job.name: found[job][0] for job in jobs}, environment=environment)
    write_text(folder / "scores" / "summary.csv", done.summary().to_csv(index=False))
    same = (folder / "config.toml").read_text(encoding="utf-8") == written
    return done, same and all(stages.intact() for _, stages in found.values())


def run_model(job: Job, bar: StageBar, model: TransformerBridge | None = None) -> tuple[Study, Store]:
    """One model's study, and the stages behind it; the model is loaded where it is not given."""
    config, name = job.config, job.name
    model = load(config.model) if model is None else model
    task = load_task(config.task, tokenizer=model)
    require_known(model, task)
    stages, marks = Store(job.folder), {"model": fingerprint(model), "pairs": task.forget_pairs.digest()}
    with bar:
        pairs, steps = task.forget_pairs, config.steps
        scores = stages.result(
            "circuit/scores", EdgeScores, {**marks, "steps": steps}, lambda: edge_attribution(model, pairs, steps=steps)
        )
        circuit = stages.result(
            "circuit/circuit",
            Circuit,
            {**marks, "scores": scores.digest(), "faithfulness": config.faithfulness},
            lambda: discover_circuit(model, pairs, scores=scores, faithfulness=config.faithfulness),
        )
        random = stages.value(
            "circuit/random", {**marks, "circuit": circuit.digest()}, lambda: random_faithfulness(model, circuit, pairs)
        )
        bar.update()
        alike, words = _wording(model, pairs)
        patching = stages.result(
            "circuit/patching",
            PatchingResult,
            {**marks, "words": words},
            lambda: activation_patching(model, alike, tokens=words),
        )
        bar.update()
        ground = _Ground(config, name, model, task, circuit, stages, bar.shown)
        references = ground.references()
        bar.update()
        results = {}
        for method in config.methods:
            bar.set_postfix_str(method)
            results[method] = ground.result(method)
            bar.update()
    return Study(config, name, job.folder, scores, circuit, random, patching, results, references, {}, {}), stages


@dataclass(frozen=True)
class _Ground:
    """What all methods of one study are run on and measured against."""

    config: StudyConfig
    name: str
    model: TransformerBridge
    task: Task
    circuit: Circuit
    stages: Store
    progress: bool

    @cached_property
    def marks(self) -> dict[str, str]:
        """Digests of what every measurement reads."""
        return {"model": fingerprint(self.model), "task": self.task.digest(), "circuit": self.circuit.digest()}

    @cached_property
    def controls(self) -> Controls:
        """What the original says; measured when first asked for."""
        scores = circuit_scores(self.model, self.circuit, self.task.forget_pairs, steps=self.config.steps)
        return Controls(self.model, self.task, self.circuit, scores)

    def result(self, method: str) -> MethodResult:
        """One method's edit and everything measured about it."""
        config, given = self.config, dict(self.config.settings.get(method, {}))
        flags = method_flags(method)
        edit = self.stages.result(
            f"edits/{method}/edit",
            Edit,
            {
                "method": method,
                "settings": settings_of(method, given).digest(),
                "model": self.marks["model"],
                "task": self.marks["task"],
                "circuit": self.marks["circuit"] if flags.takes_circuit else "",
                "seed": config.seed,
            },
            lambda: unlearn(
                self.model,
                self.task,
                method,
                circuit=self.circuit,
                seed=config.seed,
                progress=self.progress,
                checkpoint=self.stages.folder / f"edits/{method}/checkpoint.safetensors",
                **given,
            ),
        )
        edited, mark = edit.apply(self.model), {**self.marks, "edit": edit.digest(), "seed": config.seed}
        title = f"{method_title(method)} on {self.name}"
        scored = cache(partial(self._scored, edited))
        card = self.stages.result(
            f"scores/{method}/scorecard",
            Scorecard,
            {**mark, "quantizers": config.quantizers, "steps": config.steps, "title": title},
            lambda: scorecard(
                self.model,
                edited,
                self.task,
                self.circuit,
                quantizers=config.quantizers,
                title=title,
                controls=self.controls,
                edited_scores={name: scored(name) for name in config.quantizers},
                seed=config.seed,
            ),
        )
        write_text(self.stages.folder / f"scores/{method}/scorecard.csv", card.to_dataframe().to_csv(index=False))
        divergences = {}
        for name in ("", *config.quantizers):
            label = f"{method_title(method)}, {name or 'full precision'}"
            divergences[name] = self.stages.result(
                f"scores/{method}/cad_{name or 'full'}",
                Divergence,
                {**mark, "quantizer": name, "steps": config.steps, "label": label},
                partial(self._diverged, scored, name, label),
            )
        statistics = update_statistics(self.model, edited, config.quantizers[0])
        write_text(self.stages.folder / f"scores/{method}/updates.csv", statistics.to_dataframe().to_csv(index=False))
        certificate, saved = None, None
        if flags.claims_floor:
            saved = self.stages.folder / "model" / method
            certificate = self.stages.result(
                f"edits/{method}/certificate", Certificate, mark, partial(self._certified, edited, edit, saved)
            )
        return MethodResult(edit, card, divergences, statistics, certificate, saved)

    def _certified(self, edited: TransformerBridge, edit: Edit, saved: Path) -> Certificate:
        original = self.stages.folder / "model" / "original"
        grid = edit.facts["settings"]["quantizer"].split("+")[0]
        for _ in range(_PASSES):
            save(self.model, original)
            save(edited, saved)
            written = [SavedModel(folder).digest() for folder in (original, saved)]
            found = certify_in_fresh_process(original, saved, edit.indices, quantizer=grid)
            if (
                written
                == [found.original_digest, found.edited_digest]
                == [SavedModel(folder).digest() for folder in (original, saved)]
            ):
                return found
        raise MansuError(f"{saved}: something else keeps writing into it; give another results folder")

    def _scored(self, edited: TransformerBridge, quantizer: str) -> CircuitScores:
        other = under(edited, self.task, quantizer)
        return circuit_scores(other, self.circuit, self.task.forget_pairs, steps=self.config.steps)

    def _diverged(self, scored: Callable[[str], CircuitScores], quantizer: str, label: str) -> Divergence:
        pairs, seed = self.task.forget_pairs, self.config.seed
        return circuit_divergence(
            self.controls.scores(), scored(quantizer), self.circuit, pairs, label=label, seed=seed
        )

    def references(self) -> dict[str, Divergence]:
        """CAD of the un-edited model quantized, of the output suppressor, and of the never-trained model."""
        config, pairs, out = self.config, self.task.forget_pairs, {}
        mark = {**self.marks, "steps": config.steps, "seed": config.seed}

        def add(name: str, title: str, extra: Mapping[str, Any], other: Callable[[], CircuitScores]) -> None:
            out[title] = self.stages.result(
                f"scores/references/{name}",
                Divergence,
                {**mark, "title": title, **extra},
                lambda: circuit_divergence(
                    self.controls.scores(), other(), self.circuit, pairs, label=title, seed=config.seed
                ),
            )

        filtered = output_suppressor(logit_difference, _PENALTY)
        for q in config.quantizers:
            add(f"noise_{q}", f"un-edited, {q} (noise floor)", {}, partial(self._noise, q))
            suppressed = partial(self._twin_scores, q, filtered)
            add(f"suppressor_{q}", f"output suppressor, {q}", {"penalty": _PENALTY}, suppressed)
        if config.never:
            never = load(config.never)
            scored = partial(circuit_scores, never, self.circuit, pairs, steps=config.steps)
            add("never", "never trained on it", {"never": fingerprint(never)}, scored)
        return out

    def _noise(self, quantizer: str) -> CircuitScores:
        return self.controls.scores(quantizer)

    def _twin_scores(self, quantizer: str, metric: Metric) -> CircuitScores:
        twin = under(self.model, self.task, quantizer)
        return circuit_scores(twin, self.circuit, self.task.forget_pairs, steps=self.config.steps, metric=metric)


def _wording(model: TransformerBridge, pairs: PromptPairs, most: int = 48) -> tuple[PromptPairs, list[str]]:
    """At most `most` pairs of the commonest wording, and what stands at their positions."""
    alike, constant = pairs.one_wording()
    words = [
        model.tokenizer.decode([token]).strip() or "_" if same else "(subject)"
        for token, same in zip(alike.clean[0].tolist(), constant.tolist(), strict=True)
    ]
    return alike[slice(0, most)], words


def peak_memory_gb() -> float:
    """The most memory that this process has had, in GB."""
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _environment(config: StudyConfig, seconds: float, earlier: Mapping[str, Any], others_gb: float) -> dict[str, Any]:
    return {
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "seed": config.seed,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        # A run that was interrupted counts all its parts.
        "seconds": round(seconds + earlier.get("seconds", 0.0), 1),
        # Processes that ran beside it count in full, whether or not all were at their peak at once.
        "peak_memory_gb": round(max(peak_memory_gb() + others_gb, earlier.get("peak_memory_gb", 0.0)), 2),
        "config": {k: v for k, v in asdict(config).items() if k != "settings"},
    }


def _summary_row(model: str, method: str, q: str, result: MethodResult) -> dict[str, Any]:
    card, total = result.card, result.statistics.to_dataframe().iloc[-1]
    row: dict[str, Any] = {"model": model, "method": method, "quantizer": q}
    for kind in ("MC", "cloze"):
        row[f"forget_{kind}"] = card.value(f"forget {kind}, %")
        row[f"forget_{kind}_{q}"] = card.value(f"forget {kind}, %", q)
    for name in ("retain", "near"):
        measure = f"{name} cloze drop, points"
        if any(r.measure == measure for r in card.rows):
            row[f"{name}_drop"] = card.value(measure)
    cad = result.divergences[q]
    row |= {"CAD": cad.value, "CAD_low": cad.interval[0], "CAD_high": cad.interval[1]}
    row |= {"weights_changed": int(total.changed), "codes_changed": int(total.codes_changed), "passed": card.passed}
    return row
