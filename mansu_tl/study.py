"""The whole road as one resumable run: circuit, edits, models, certificates, scores, all in one results folder.

Each stage writes its results when it is done, with a key of everything it depends on; a later run with the same key
reads them back instead. A study may name further models (`also`) on which the same methods and questions are run.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
from mansu_tl.errors import MansuError
from mansu_tl.files import write_text
from mansu_tl.metrics import Metric, logit_difference
from mansu_tl.models import fingerprint, load, save
from mansu_tl.notebook import Result, Table
from mansu_tl.patching import PatchingResult, activation_patching
from mansu_tl.processes import Processes, StageBar, cores, is_small, one_thread
from mansu_tl.quantization import UpdateStatistics, quantize, update_statistics
from mansu_tl.stages import Stages, task_key
from mansu_tl.tasks import load_task
from mansu_tl.unlearning import Edit, method_title, unlearn
from mansu_tl.verification import (
    Certificate,
    CircuitScores,
    Divergence,
    Scorecard,
    certify_in_fresh_process,
    circuit_divergence,
    circuit_scores,
    output_suppressor,
    scorecard,
)

_PACKAGES = ("mansu-tl", "torch", "transformers", "transformer-lens", "bitsandbytes", "safetensors", "plotly")
_PENALTY = 20.0


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
        for name, study in {self.config.model: self, **self.also}.items():
            for method, result in study.results.items():
                for q in study.config.quantizers:
                    rows.append(_summary_row(Path(name).name or name, method, q, result))
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"Study({self.folder}: {', '.join(self.results)} on {', '.join([self.config.model, *self.also])})"

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
        MansuError: the folder cannot be written to, or anything the stages refuse.
    """
    if workers is not None and workers < 1:
        raise MansuError(f"run_study: workers={workers}; choose at least 1")
    folder = Path(out)
    write_text(folder / "config.toml", config.to_toml())
    started, record = time.perf_counter(), folder / "environment.json"
    inner = {
        folder / "also" / (Path(name).name or name): StudyConfig(**{**config.__dict__, "model": name, "also": ()})
        for name in config.also
    }
    for path, each in inner.items():
        write_text(path / "config.toml", each.to_toml())
    model = load(config.model)
    small = is_small(model)
    helpers = (workers or cores()) - 1 if small else 0
    with one_thread(small):
        done: dict[Path, tuple[Study, int]] = {}
        with Processes(inner, helpers, progress) as others:
            study, made = run_model(config, folder, StageBar(config, progress, others.check), model)
            while (unclaimed := others.claim()) is not None:
                each = inner[unclaimed]
                done[unclaimed] = run_model(each, unclaimed, StageBar(each, progress, others.check))
            others.wait()
        for path, each in inner.items():
            if path not in done:
                done[path] = run_model(each, path, StageBar(each, False))
        made += others.made + sum(more for _, more in done.values())
        also = {path.name: done[path][0] for path in inner}
        earlier = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        environment = (
            earlier
            if earlier and not made
            else _environment(config, time.perf_counter() - started, earlier, others.peak_memory_gb)
        )
    write_text(record, json.dumps(environment, indent=2))
    whole = Study(**{**study.__dict__, "also": also, "environment": environment})
    write_text(folder / "scores" / "summary.csv", whole.summary().to_csv(index=False))
    return whole


def run_model(
    config: StudyConfig, folder: Path, bar: StageBar, model: TransformerBridge | None = None
) -> tuple[Study, int]:
    """One model's study without `also`, and how many stages had to be run for it; the model is loaded if not given."""
    model = load(config.model) if model is None else model
    task = load_task(config.task, tokenizer=model)
    stages = Stages(folder, {"model": fingerprint(model), "task": task_key(task), "seed": config.seed})
    with bar:
        pairs = task.forget_pairs
        asked = {"steps": config.steps, "faithfulness": config.faithfulness}
        scores = stages.tensor(
            "circuit/scores", EdgeScores, asked, lambda: edge_attribution(model, pairs, steps=config.steps)
        )
        circuit = stages.tensor(
            "circuit/circuit",
            Circuit,
            asked,
            lambda: discover_circuit(model, pairs, scores=scores, faithfulness=config.faithfulness),
        )
        random = stages.value("circuit/random", asked, lambda: random_faithfulness(model, circuit, pairs))
        bar.update()
        patching = stages.tensor("circuit/patching", PatchingResult, {}, partial(_sweep, model, pairs))
        bar.update()
        before = circuit_scores(model, circuit, pairs, steps=config.steps)
        references = _references(config, model, circuit, task, before, stages)
        bar.update()
        results = {}
        for method in config.methods:
            bar.set_postfix_str(method)
            results[method] = _method(config, model, task, circuit, before, method, stages, bar.shown)
            bar.update()
    return Study(config, folder, scores, circuit, random, patching, results, references, {}, {}), stages.made


def _method(
    config: StudyConfig,
    model: TransformerBridge,
    task: Task,
    circuit: Circuit,
    before: CircuitScores,
    method: str,
    stages: Stages,
    progress: bool,
) -> MethodResult:
    settings = dict(config.settings.get(method, {}))
    key = {"settings": settings, "circuit": [list(edge) for edge in circuit.edges] if method == "mansu" else []}
    edit = stages.tensor(
        f"edits/{method}/edit",
        Edit,
        key,
        lambda: unlearn(model, task, method, circuit=circuit, seed=config.seed, progress=progress, **settings),
    )
    edited = edit.apply(model)
    key = {**key, "quantizers": list(config.quantizers), "edges": [list(edge) for edge in circuit.edges]}
    card = stages.tensor(
        f"scores/{method}/scorecard",
        Scorecard,
        key,
        lambda: scorecard(
            model,
            edited,
            task,
            circuit,
            quantizers=config.quantizers,
            title=f"{method_title(method)} on {Path(config.model).name}",
            original_scores=before,
            seed=config.seed,
        ),
    )
    write_text(stages.folder / f"scores/{method}/scorecard.csv", card.to_dataframe().to_csv(index=False))
    divergences = {}
    for name in ("", *config.quantizers):
        label = f"{method_title(method)}, {name or 'full precision'}"
        divergences[name] = stages.tensor(
            f"scores/{method}/cad_{name or 'full'}",
            Divergence,
            key,
            partial(_diverged, before, edited, name, circuit, task, label, config),
        )
    statistics = update_statistics(model, edited, config.quantizers[0])
    write_text(stages.folder / f"scores/{method}/updates.csv", statistics.to_dataframe().to_csv(index=False))
    certificate, saved = None, None
    if method == "mansu":
        saved = stages.folder / "model" / method
        certificate = _certified(config, model, edited, edit, stages, saved, key)
    return MethodResult(edit, card, divergences, statistics, certificate, saved)


def _certified(
    config: StudyConfig,
    model: TransformerBridge,
    edited: TransformerBridge,
    edit: Edit,
    stages: Stages,
    saved: Path,
    key: Mapping[str, Any],
) -> Certificate:
    original = stages.folder / "model" / "original"

    def make() -> Certificate:
        save(model, original)
        save(edited, saved)
        grid = edit.facts["settings"]["quantizer"].split("+")[0]
        return certify_in_fresh_process(original, saved, edit.indices, quantizer=grid)

    return stages.json("model/certificate", Certificate, key, make)


def _references(
    config: StudyConfig, model: TransformerBridge, circuit: Circuit, task: Task, before: CircuitScores, stages: Stages
) -> dict[str, Divergence]:
    pairs, out = task.forget_pairs, {}
    key = {"edges": [list(edge) for edge in circuit.edges], "steps": config.steps}

    def add(name: str, title: str, extra: Mapping[str, Any], other: Callable[[], CircuitScores]) -> None:
        out[title] = stages.tensor(
            f"scores/references/{name}",
            Divergence,
            {**key, **extra},
            lambda: circuit_divergence(before, other(), circuit, pairs, label=title, seed=config.seed),
        )

    filtered = output_suppressor(logit_difference, _PENALTY)
    for q in config.quantizers:
        twin = partial(_twin_scores, model, q, circuit, task, config.steps)
        add(f"noise_{q}", f"un-edited, {q} (noise floor)", {}, partial(twin, logit_difference))
        add(f"suppressor_{q}", f"output suppressor, {q}", {"penalty": _PENALTY}, partial(twin, filtered))
    if config.never:
        never = load(config.never)
        scored = partial(circuit_scores, never, circuit, pairs, steps=config.steps)
        add("never", "never trained on it", {"never": fingerprint(never)}, scored)
    return out


def _twin_scores(
    model: TransformerBridge, name: str, circuit: Circuit, task: Task, steps: int, metric: Metric
) -> CircuitScores:
    twin = quantize(model, name, task.retain_text)
    return circuit_scores(twin, circuit, task.forget_pairs, steps=steps, metric=metric)


def _diverged(
    before: CircuitScores,
    edited: TransformerBridge,
    name: str,
    circuit: Circuit,
    task: Task,
    label: str,
    config: StudyConfig,
) -> Divergence:
    other = quantize(edited, name, task.retain_text) if name else edited
    return circuit_divergence(
        before, other, circuit, task.forget_pairs, label=label, steps=config.steps, seed=config.seed
    )


def _sweep(model: TransformerBridge, pairs: PromptPairs, most: int = 48) -> PatchingResult:
    """The residual stream over layers and positions, on at most `most` pairs of the commonest wording."""
    alike, constant = pairs.one_wording()
    words = [
        model.tokenizer.decode([token]).strip() or "_" if same else "(subject)"
        for token, same in zip(alike.clean[0].tolist(), constant.tolist(), strict=True)
    ]
    return activation_patching(model, alike[slice(0, most)], tokens=words)


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
