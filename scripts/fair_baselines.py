"""Baselines on `pocket` with trials over more than the rate: `python scripts/fair_baselines.py OUT --out TABLE.csv`.

The comparison searches a baseline's learning rate alone. Here each has four trials over rate, retain weight and near share,
the same four for all, and is chosen by what is deployed: of the trials that forget in NF4 on the validation part, the one
that loses the least cloze there on what should stay. The chosen one runs on further seeds and is measured on the other two
thirds: answers as stored and in NF4, the near facts' log-odds, what its streams still hold (CAD by depth, logit lens),
relearning beside the never-trained model. Edits are kept in OUT, so an interrupted run goes on. All trials are in the table.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.data import Task
from mansu_tl.data.counterparts import counterparts, facts_first
from mansu_tl.data.split import split_questions
from mansu_tl.errors import NoEditError
from mansu_tl.unlearning import Edit, settings_of, unlearn
from mansu_tl.unlearning.search import Search, Trial, judge
from mansu_tl.verification import DepthReader, attack_splits, compare_relearning, logit_lens

NEVER, MANSU = "never trained", "mansu-early"
TRIALS: tuple[dict[str, float], ...] = (
    {"learning_rate": 1e-4, "retain_weight": 1.0, "near_share": 0.25},
    {"learning_rate": 3e-4, "retain_weight": 5.0, "near_share": 0.5},
    {"learning_rate": 1e-3, "retain_weight": 30.0, "near_share": 0.5},
    {"learning_rate": 1e-3, "retain_weight": 100.0, "near_share": 0.5},
)
ROWS = 64  # forget and near prompts that are read by depth
METHODS = ("graddiff", "npo", "simnpo", "rmu")


def edit_of(
    model: Any, task: Task, method: str, trial: dict[str, float], seed: int, folder: Path
) -> Edit | NoEditError:
    """One edit, from OUT where it is there."""
    name = "-".join([method, *(f"{value:g}" for value in trial.values()), str(seed)])
    place = folder / f"{name}.safetensors"
    if place.exists():
        return Edit.load(place)
    try:
        if method == MANSU:
            edit = unlearn(model, task, MANSU, seed=seed, circuit=circuit_of(model, task, folder))
        else:
            edit = unlearn(model, task, method, settings=settings_of(method, {**trial, "retain_batch": 64}), seed=seed)
    except NoEditError as error:
        return error
    edit.save(place)
    return edit


def circuit_of(model: Any, task: Task, folder: Path) -> Circuit:
    """The forget circuit, found once."""
    place = folder / "circuit.safetensors"
    if not place.exists():
        mtl.discover_circuit(model, task.forget_pairs, faithfulness=0.85).save(place)
    return Circuit.load(place)


def deployed(model: Any, validation: Task, edit: Edit | NoEditError, rate: float) -> Trial:
    """`judge` of what is shipped: the edited model in NF4 in the edited model's place."""
    if isinstance(edit, NoEditError):
        return judge(model, validation, edit, rate)
    shipped = mtl.quantize(edit.apply(model), "nf4")
    values = {name: value for name, value in mtl.models.parameters(shipped).items() if name in edit.new}
    return judge(model, validation, Edit.between(model, values, edit.method, {}), rate)


def row(model: Any, edit: Edit, task: Task) -> dict[str, float]:
    """What an edit comes to on some questions."""
    edited = edit.apply(model)
    found = mtl.accuracy(edited, task.questions["forget"])
    near = mtl.accuracy(edited, task.questions["near"])
    shipped = mtl.accuracy(mtl.quantize(edited, "nf4"), task.questions["forget"])
    return {
        "forget MC, %": found.mc_percent,
        "forget cloze, %": found.cloze_percent,
        "forget MC after NF4, %": shipped.mc_percent,
        "near MC, %": near.mc_percent,
        "near cloze, %": near.cloze_percent,
        "near log-odds, nats": near.log_odds.double().mean().item(),
        "near cloze, held out, %": mtl.accuracy(edited, task.questions["near_paraphrase"]).cloze_percent,
        "retain cloze, held out, %": mtl.accuracy(edited, task.questions["retain_paraphrase"]).cloze_percent,
    }


def inside(reader: DepthReader, edited: Any, task: Task) -> dict[str, Any]:
    """What its streams still hold."""
    read, lens = reader.read(edited), logit_lens(edited, task.questions["forget"]).to_dataframe().set_index("layer")
    at = read.layers[read.judged]
    return {
        f"CAD at {at}": float(read.cad[read.judged]),
        f"specificity at {at}": float(read.specificity[read.judged]),
        "added opposition": float(read.opposition),
        "verdict": read.verdict().name,
        f"logit lens {at}, %": float(lens.multiple_choice[at]),
    }


# What the documentation shows of the measured part: a line's name, the column behind it, digits.
SHOWN = (
    ("forget, chosen among four, %", "forget MC, %", 0),
    ("the same after NF4, %", "forget MC after NF4, %", 0),
    ("forget, said, %", "forget cloze, %", 0),
    ("near, margin, nats", "near log-odds, nats", 1),
    ("near, said, held-out wording, %", "near cloze, held out, %", 0),
    ("far, said, held-out wording, %", "retain cloze, held out, %", 0),
    ("CAD behind L1", "CAD at L1", 2),
    ("added opposition", "added opposition", 2),
    ("logit lens behind L1, %", "logit lens L1, %", 0),
    ("relearning, 12 facts at 3e-4, points", "relearning at 0.0003, points", 0),
    ("relearning, 12 facts at 1e-3, points", "relearning at 0.001, points", 0),
)


def page(table: pd.DataFrame) -> str:
    """The table of the documentation: what was chosen, on the test part, by seed."""
    found = table[table.part == "test"].sort_values(["method", "seed"])
    names = list(dict.fromkeys(found.method))
    lines = ["| " + " | ".join(["", *names]) + " |", "| --- " * (len(names) + 1) + "|"]
    for title, column, digits in SHOWN:
        cells = [" / ".join(f"{float(x):.{digits}f}" for x in found[found.method == name][column]) for name in names]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="of what was chosen")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    start, model, task = time.monotonic(), mtl.load("pocket"), mtl.load_task("pocket")
    validation, test = split_questions(task)
    never, rows = mtl.load("pocket-never"), list[dict[str, Any]]()
    chosen: dict[str, dict[str, float]] = {MANSU: {}}
    for method in options.methods:
        judged = []
        for trial in TRIALS:
            edit = edit_of(model, task, method, trial, 0, options.folder)
            judged.append(deployed(model, validation, edit, trial["learning_rate"]))
            if isinstance(edit, Edit):
                rows.append(
                    {"method": method, **trial, "part": "validation", "seed": 0, **row(model, edit, validation)}
                )
            print(f"{time.monotonic() - start:6.0f} s  {method} {trial}: {judged[-1]}", flush=True)
        chosen[method] = TRIALS[judged.index(Search(method, tuple(judged), 0).best)]
    pairs, near = task.forget_pairs, counterparts(task.questions["near"], ROWS)
    reader = DepthReader(model, pairs[sorted(facts_first(pairs.facts)[:ROWS])], near)
    attacks = attack_splits(replace(task, questions=test.questions), k=12, splits=1)
    for method, trial in chosen.items():
        for seed in range(options.seeds):
            edit = edit_of(model, task, method, trial, seed, options.folder)
            if isinstance(edit, NoEditError):
                continue
            models = {method: edit.apply(model), NEVER: never}
            again = compare_relearning(models, attacks, reference=NEVER).summary()
            found = row(model, edit, test) | inside(reader, models[method], test)
            rows.append({"method": method, **trial, "part": "test", "seed": seed, **found})
            for one in again[again.label == method].itertuples():
                rows[-1][f"relearning at {one.learning_rate:g}, points"] = one.over_reference
            print(f"{time.monotonic() - start:6.0f} s  {rows[-1]}", flush=True)
            pd.DataFrame(rows).to_csv(options.out, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
