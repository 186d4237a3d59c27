"""EleutherAI's lm-evaluation-harness on the models of a study: original, edited and quantized, its numbers beside ours.

The harness is not a dependency (`pip install lm-eval`). Each model's results are kept in the study's folder under
lm_eval/, so that an interrupted run goes on with the next model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data.sources import load_task, read_choices
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint, load
from mansu_tl.quantization import quantize
from mansu_tl.results.result import Result, Table
from mansu_tl.results.store import Store
from mansu_tl.runs.metrics import accuracy
from mansu_tl.study.collect import config_in
from mansu_tl.study.config import StudyConfig
from mansu_tl.study.plan import ORIGINAL, title_of
from mansu_tl.unlearning import Edit
from mansu_tl.verification.choices import evaluate_choices
from mansu_tl.verification.writing import writing_copy

_PIP = "pip install lm-eval"
_NAME = re.compile(r"^task:\s*['\"]?([\w.-]+)", re.MULTILINE)
# Question sets of the study that stand beside the harness's numbers.
_SETS = ("forget", "near", "retain")


@dataclass(frozen=True)
class HarnessScores(Result):
    """What the harness says about each model, and what the study says.

    Attributes:
        table: one row a model, quantizer ("" = full precision), task and metric: the harness's value and standard error, and
            ours on the same questions where they were given (else NaN).
        own: one row a model and quantizer: the study's multiple-choice accuracies, in percent.
    """

    table: pd.DataFrame
    own: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """The harness's rows, the study's accuracies of the same model beside each."""
        return self.table.merge(self.own, on=["model", "quantizer"], how="left")

    def __repr__(self) -> str:
        tasks, models = (dict.fromkeys(self.table[key]) for key in ("task", "model"))
        return f"HarnessScores({', '.join(map(str, tasks))} of {', '.join(map(str, models))})"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), form="{:.3f}".format, rows=60),)


def harness_scores(
    folder: str | PathLike[str],
    tasks: Sequence[str],
    *,
    same: Mapping[str, str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> HarnessScores:
    """Run the harness on a study's original and edited models, in full precision and under its quantizers.

    Args:
        folder: the results folder of `mansu-tl run`.
        tasks: names of the harness's, "wmdp_bio", or YAML files of tasks of your own, "mine.yaml", as it reads them.
        same: by task, where its questions lie (a file, a folder's part or a hub id): ours is then `evaluate_choices` on them.
        limit: so many questions of every task, as the harness takes them; None = all.
        batch_size: of the harness.
        progress: show a bar over the models.

    Raises:
        MansuError: no results folder or finished edit, no task, a task file that is not there or names no task, the harness
            is not installed or refuses a task, or questions for a task that is not run.
    """
    if not tasks or not all(tasks):
        raise MansuError("lm-eval: no task named; give some of the harness's, such as wmdp_bio,mmlu")
    files = {each: _TaskFile.read(each) for each in tasks if each.endswith((".yaml", ".yml"))}
    tasks = [files[each].name if each in files else each for each in tasks]
    for given in same or {}:
        if given not in tasks:
            raise MansuError(
                f"lm-eval: questions are given for {given!r}, which is not among the tasks {', '.join(tasks)}"
            )
    config = StudyConfig.read(config_in(folder))
    run = _harness([each.folder for each in files.values()], alone=len(files) == len(tasks))
    questions = {each: read_choices(place) for each, place in (same or {}).items()}
    rows: list[dict[str, Any]] = []
    own: list[dict[str, Any]] = []
    store = Store(Path(folder), shared=True)
    model = load(config.model, device=config.device)
    task = load_task(config.task, tokenizer=model)
    models = list(_models(config, Path(folder), model))
    with tqdm(
        total=len(models) * (1 + len(config.quantizers)), desc="lm-eval", unit="model", disable=not progress
    ) as bar:
        for method, make in models:
            edited = make()
            for name in ("", *config.quantizers):
                key = {
                    "model": fingerprint(edited), "quantizer": name, "tasks": list(tasks), "limit": limit,
                    "same": {each: [one.prompt for one in items] for each, items in questions.items()},
                    **({"files": [each.text for each in files.values()]} if files else {}),
                }  # fmt: skip

                def measured(one: TransformerBridge = edited, name: str = name) -> dict[str, Any]:
                    deployed = quantize(one, name, task.retain_text) if name else one
                    return {
                        "harness": run(deployed, tasks, limit, batch_size),
                        "same": {each: evaluate_choices(deployed, items).accuracy for each, items in questions.items()},
                        "own": {
                            f"{kind}_MC": accuracy(deployed, task.questions[kind]).mc_percent
                            for kind in _SETS
                            if kind in task.questions
                        },
                    }

                found = store.value(f"lm_eval/{method}{'.' * bool(name)}{name}", key, measured)
                place = {"model": title_of(method), "quantizer": name}
                rows += [
                    {**place, **row, "ours": found["same"].get(row["task"], math.nan)}
                    for row in _rows(found["harness"])
                ]
                own.append({**place, **found["own"]})
                bar.update()
    columns = ["model", "quantizer", "task", "metric", "value", "stderr", "ours"]
    return HarnessScores(pd.DataFrame(rows, columns=columns), pd.DataFrame(own))


def _models(
    config: StudyConfig, folder: Path, model: TransformerBridge
) -> Iterator[tuple[str, Callable[[], TransformerBridge]]]:
    """The original, and what makes each edited model of the folder."""
    edits = {method: folder / "edits" / method / "edit.safetensors" for method in config.methods}
    missing = [method for method, path in edits.items() if not path.is_file()]
    if missing:
        raise MansuError(
            f"{folder}: the edit of {missing[0]} is not there yet; finish the run: mansu-tl report {folder}"
        )
    yield ORIGINAL, lambda: model
    for method, path in edits.items():
        yield method, lambda path=path: Edit.load(path).apply(model)  # type: ignore[misc]


@dataclass(frozen=True)
class _TaskFile:
    """A task of the user's own: what it is called, where it lies, and what it says."""

    name: str
    folder: Path
    text: str

    @classmethod
    def read(cls, place: str) -> _TaskFile:
        path = Path(place)
        if not path.is_file():
            raise MansuError(f"lm-eval: {place}: no such task file; check the path")
        text = path.read_text(encoding="utf-8")
        found = _NAME.search(text)
        if found is None:
            raise MansuError(f"lm-eval: {place}: names no task; write a line task: NAME in it")
        return cls(found.group(1), path.resolve().parent, text)


def _harness(
    folders: Sequence[Path], *, alone: bool
) -> Callable[[TransformerBridge, Sequence[str], int | None, int], dict[str, Any]]:
    """Runs the harness on a model; gives its results by task, plain numbers alone.

    Args:
        folders: where task files lie.
        alone: no task of the harness's own is asked for.
    """
    try:
        lm_eval, hf_models = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
        made = import_module("lm_eval.tasks").TaskManager if folders else None
    except ImportError as error:
        raise MansuError(f"lm-eval: the harness is not installed ({error}); {_PIP}") from None

    more = {}
    if made is not None:
        more["task_manager"] = made(include_path=[str(each) for each in folders], include_defaults=not alone)

    def run(model: TransformerBridge, tasks: Sequence[str], limit: int | None, batch_size: int) -> dict[str, Any]:
        lm = hf_models.HFLM(pretrained=writing_copy(model), tokenizer=model.tokenizer, batch_size=batch_size)
        try:
            found = lm_eval.simple_evaluate(model=lm, tasks=list(tasks), limit=limit, log_samples=False, **more)
        except (KeyError, ValueError) as error:  # a task that it does not know
            raise MansuError(
                f"lm-eval: the harness refuses {', '.join(tasks)} ({error}); see: lm-eval ls tasks"
            ) from None
        return {
            str(task): {key: value for key, value in metrics.items() if isinstance(value, int | float)}
            for task, metrics in found["results"].items()
        }

    return run


def _rows(results: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    """The harness's metrics, "acc,none" with "acc_stderr,none", as rows; a filter other than none stays in the name."""
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, kept = key.partition(",")
            if metric.endswith("_stderr") or not kept:
                continue
            name = metric if kept == "none" else f"{metric},{kept}"
            error = metrics.get(f"{metric}_stderr,{kept}", math.nan)
            yield {"task": task, "metric": name, "value": float(value), "stderr": float(error)}
