"""MANSU's hyperparameters one at a time, on the validation half of `pocket`'s questions: the sensitivity figure.

`python -m tests.benchmarks.sensitivity --out figures/tables/sensitivity.csv [--full] [--part 1/2]`: about a minute a
setting with the light settings, three with the full ones. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from tqdm.auto import tqdm

import mansu_tl as mtl
from mansu_tl.data.split import split_questions
from mansu_tl.results.files import write_text

GRID: dict[str, tuple[Any, ...]] = {
    "budget": (0.005, 0.01, 0.03),
    "neuron_share": (0.1, 0.5, 1.0),
    "steps": (50, 100, 400),
    "learning_rate": (0.03, 0.3),
    "margin": (-0.5, 0.0, 0.5),
    "band_weight": (0.0, 0.2),
    "divergence_weight": (0.0, 3.0),
    "retain_weight": (2.0, 60.0),
    "near_weight": (1.0, 30.0),
    "likelihood": (0.0, 1.0),
    "null_space": (0.0, 20.0),
    "retain_budget": (0.0005, 0.001),
    "representation_weight": (1.0, 4.0),
    "freeze_at": (0.3, 0.9),
    "retain_batch": (8, 96),
    "forget_batch": (24, 192),
    "margin_weight": (0.3, 3.0),
    "band": (0.25, 1.0),
    "select_from": (0.0, 0.5),
    "select_every": (5, 30),
    "fisher": (False,),
    "fisher_sequences": (32,),
    "projector": (True,),
}
_KEPT = ("retain", "retain_paraphrase", "near", "near_paraphrase")


def main(
    out: Annotated[Path, typer.Option()] = Path("figures/tables/sensitivity.csv"),
    full: Annotated[bool, typer.Option(help="Around the defaults instead of the light settings.")] = False,
    part: Annotated[str, typer.Option(help="i/n")] = "1/1",
) -> None:
    """Measure every setting that is not in the table yet."""
    i, n = (int(number) for number in part.split("/"))
    base = mtl.unlearning.MansuSettings() if full else mtl.unlearning.MansuSettings.light()
    model, task = mtl.load("pocket"), mtl.load_task("pocket")
    validation, _ = split_questions(task)
    circuit = mtl.discover_circuit(model, task.forget_pairs)
    target = out if n == 1 else out.with_suffix(f".{i}{out.suffix}")
    rows = (
        pd.read_csv(target, dtype={"value": str}, keep_default_na=False).to_dict("records") if target.is_file() else []
    )
    known = {
        (row["hyperparameter"], "None" if row["hyperparameter"] == "default" else str(row["value"])) for row in rows
    }
    jobs = [("", None), *((key, value) for key, values in GRID.items() for value in values)]
    for key, value in tqdm([job for k, job in enumerate(jobs) if k % n == i - 1], unit="setting"):
        if (key or "default", str(value)) in known:
            continue
        settings = {key: value} if key else {}
        edit = mtl.unlearn(model, task, "mansu", circuit=circuit, settings=base, seed=0, **settings)
        edited = edit.apply(model)
        found = {name: mtl.accuracy(edited, validation.questions[name]) for name in ("forget", *_KEPT)}
        cad = mtl.circuit_divergence(model, mtl.quantize(edited, "nf4"), circuit, task.forget_pairs)
        results = {
            "forget MC, %": found["forget"].mc_percent,
            "kept sets, cloze points lost": 100 - sum(found[name].cloze_percent for name in _KEPT) / len(_KEPT),
            "CAD after NF4": cad.value,
            "edited, %": 100 * edit.linear_share(model),
        }
        rows += [
            {"hyperparameter": key or "default", "value": str(value), "measure": measure, "result": result}
            for measure, result in results.items()
        ]
        write_text(target, pd.DataFrame(rows).to_csv(index=False))


if __name__ == "__main__":
    typer.run(main)
