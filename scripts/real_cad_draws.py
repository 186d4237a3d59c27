"""CAD by depth on the test draws: `python scripts/real_cad_draws.py OUT --jobs landmark_in_country-0:mansu-closed ...`.

OUT is the folder of `scripts/real_evidence.py`: its tasks and circuits. Every method runs with the settings chosen from the
trials, as there; its edit is read as stored and in the file. Near facts are those kept back: no method was trained on them.
Rows go to OUT/real_cad_draws.csv, one job after another; what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.data import PromptPairs
from mansu_tl.study.shipping import ship
from mansu_tl.unlearning.registry import settings_of
from mansu_tl.verification import DepthReader
from scripts.real_evidence import choose, read


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", nargs="+", required=True)
    parser.add_argument("--trials", type=Path, default=Path("figures/tables/real_trials.csv"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    start, table = time.monotonic(), options.out / "real_cad_draws.csv"
    trials = pd.read_csv(options.trials, dtype=str, keep_default_na=False)
    for column in ("mc_percent", "cloze_percent"):
        trials[column] = trials[column].astype(float)
    model = mtl.load(options.model, device=options.device)
    done = pd.read_csv(table) if table.exists() else pd.DataFrame()
    readers: dict[str, DepthReader] = {}
    for job in options.jobs:
        name, method = job.split(":")
        relation, part = name.rsplit("-", 1)
        if len(done) and ((done.task == name) & (done.method == method)).any():
            continue
        task, _ = read(options.out / f"{name}.json", model, options.device)
        circuit = Circuit.load(options.out / f"{name}.circuit.safetensors")
        if name not in readers:
            readers = {name: DepthReader(model, task.forget_pairs, near_of(model, options.out / f"{name}.json"))}
        best = choose(trials, relation, method)
        short = {} if method == "mansu-closed" else {"max_steps": 60, "check_every": 2, "retain_batch": 16}
        given = {"circuit": circuit} if method == "mansu-closed" else {}
        edit = mtl.unlearn(
            model, task, method, settings=settings_of(method, {**short, **best}), seed=int(part), **given
        )
        with tempfile.TemporaryDirectory() as folder:
            file = mtl.load(ship(edit, model, Path(folder, "m.gguf")), tokenizer=model.tokenizer, device=options.device)
        for form, one in (("stored", edit.apply(model)), ("shipped", file)):
            found = readers[name].read(one, label=f"{method}, {form}")
            columns = {"task": name, "method": method, "form": form, "verdict": found.verdict().name,
                       "facts_gone": found.facts_gone, "opposition": found.opposition}  # fmt: skip
            rows = found.to_dataframe().assign(judged=[i == found.judged for i in range(len(found.layers))], **columns)
            done = pd.concat([done, rows])
            print(f"{time.monotonic() - start:6.0f} s  {name} {found}\n         {found.verdict()}", flush=True)
        done.to_csv(table, index=False, float_format="%.4f")


def near_of(model: Any, place: Path) -> PromptPairs:
    """The near facts that were kept back, each in its first wording."""
    found = json.loads(place.read_text())
    back, rows = set(found["kept_back"]), {}
    for row in found["rows"]:
        if row["set"] == "near" and row["fact"] in back:
            rows.setdefault(row["fact"], row)
    return PromptPairs.from_text(
        model, [row["clean"] for row in rows.values()], [row["corrupt"] for row in rows.values()],
        [row["answer"] for row in rows.values()], [row["distractors"] for row in rows.values()], facts=list(rows),
    )  # fmt: skip


if __name__ == "__main__":
    main()
