"""What the forget term at the place is worth on a pretrained model: `python scripts/real_place.py RUN --device cuda`.

RUN is the folder of `real_evidence.py tasks` and `run` (tasks and circuits). `mansu-early` edits the first half of the layers
by a gradient; its term at the place asks that each of them has forgotten by itself. Of the trials on the validation facts the
one of least regret is chosen among those called erased there, as stored and in the file; among all, where none is. It is then
run on every test draw, with the place and without; each edit is asked, read by depth, and relearnt: half of its facts are
trained on, the others asked. The attacker in the loop, which takes most of the time, is left out. Each edit is a line of
RUN/place.jsonl; what is there is not done again. `--out TABLE.csv` writes a row an edit, `--pairs TABLE.csv` what the arms
differ in on the same draws.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import torch

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.study.shipping import ship
from mansu_tl.unlearning import settings_of
from mansu_tl.verification import attack_splits, relearn
from scripts.real_ablations import RATE, STEPS, table
from scripts.real_evidence import TO_GO, TO_STAY, by_depth, pooled, read, regret

METHOD = "mansu-early"
# Edits are made on the codes of the file that is written.
SHARED = {"quantizer": "gguf", "contexts": 3, "adversary_weight": 0.0, "steps": 200}
TRIALS: tuple[dict[str, Any], ...] = (
    {"budget": 0.01, "gradual": 0.5},
    {"budget": 0.05, "gradual": 0.5},
    {"budget": 0.01, "gradual": 0.5, "learning_rate": 0.03},
    {"budget": 0.01, "gradual": 0.5, "representation_weight": 0.0, "margin": 0.1},
    {"budget": 0.01, "gradual": 0.5, "retain_weight": 40.0},
    {"budget": 0.05, "gradual": 0.5, "learning_rate": 0.03, "retain_weight": 40.0},
)
# What the table tells of an edit's settings.
NAMED = (
    "budget", "gradual", "learning_rate", "retain_weight", "representation_weight", "margin", "place_weight", "contexts",
    "steps", "retain_batch",
)  # fmt: skip
LINEAR = 106_168_320  # linear weights of SmolLM2, of which the documentation's table gives shares
WITH = "whole"
ARMS: dict[str, dict[str, Any]] = {WITH: {}, "place off": {"place_weight": 0.0}}
ASKED = ("forget", "forget, other words", "near", "near, kept back", "retain")
FORMS = ("stored", "shipped")
MODELS: dict[str, Any] = {}  # of this process


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One edit, asked, read by depth and, on a test draw, relearnt; or the original, asked."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(job["threads"])
    start, run, device, name = time.monotonic(), Path(job["run"]), job["device"], job["task"]
    if job["model"] not in MODELS:
        MODELS[job["model"]] = mtl.load(job["model"], device=device)
    model = MODELS[job["model"]]
    task, asked = read(run / f"{name}.json", model, device)
    out: dict[str, Any] = {**job, "forms": {}}
    forms = {"stored": model}
    if job["variant"] != "original":
        settings = settings_of(METHOD, {**SHARED, "retain_batch": job["retain_batch"], **job["settings"]})
        circuit = Circuit.load(run / f"{name}.circuit.safetensors")
        edit = mtl.unlearn(model, task, METHOD, settings=settings, seed=0, circuit=circuit)
        out |= {"weights": edit.n_weights, "edit seconds": time.monotonic() - start}
        forms["stored"] = edited = edit.apply(model)
        with tempfile.TemporaryDirectory() as folder:
            file = ship(edit, model, Path(folder, "model.gguf"))
            forms["shipped"] = mtl.load(file, tokenizer=model.tokenizer, device=device)
        out["by depth"] = by_depth(model, task, run / f"{name}.json", forms)
    for form, one in forms.items():
        out["forms"][form] = {kind: _scores(mtl.accuracy(one, asked[kind])) for kind in ASKED if kind in asked}
    if job["variant"] != "original" and not name.endswith("validation"):
        (attack,) = attack_splits(task, k=len(set(task.forget_pairs.facts)) // 2, splits=1)
        curve = relearn(edited, attack, steps=STEPS, learning_rate=RATE, batch_size=16, ask_at=(0, STEPS))
        mc, log_odds = curve.values[0, -1].tolist(), curve.values[2, -1].tolist()
        out["forms"]["stored"]["relearned"] = {"fact": list(curve.facts), "mc": mc, "log_odds": log_odds}
    return {**out, "seconds": time.monotonic() - start}


def _scores(found: Any) -> dict[str, list[Any]]:
    return {
        "fact": list(found.facts),
        "mc": found.multiple_choice.float().tolist(),
        "cloze": found.cloze.float().tolist(),
        "log_odds": [round(x, 4) for x in found.log_odds.tolist()],
    }


def means(row: dict[str, Any]) -> pd.DataFrame:
    """What an edit leaves and takes, in percent, as `regret` reads it."""
    rows = []
    for form, kinds in row["forms"].items():
        for kind in (*TO_GO, *TO_STAY):
            if kind in kinds:
                shares = {f"{what}_percent": 100 * mean(kinds[kind][what]) for what in ("mc", "cloze")}
                rows.append({"form": form, "questions": kind, **shares})
    return pd.DataFrame(rows)


def choose(done: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The settings for a relation, once all its trials are there."""
    here = [row for row in done if row["task"] == f"{name}-validation"]
    trials = [row for row in here if row["variant"] == WITH]
    original = [row for row in here if row["variant"] == "original"]
    if len(trials) < len(TRIALS) or not original:
        return None
    erased = [row for row in trials if all(row["by depth"][form]["verdict"] == "erased" for form in FORMS)]
    return min(erased or trials, key=lambda row: regret(means(row), means(original[0])))["settings"]


def key(job: dict[str, Any]) -> str:
    """What tells edits apart."""
    return json.dumps([job[name] for name in ("task", "variant", "settings", "retain_batch")], sort_keys=True)


def run(options: argparse.Namespace) -> None:
    """Trials on the validation facts, then the choice on every test draw in both arms; a line of place.jsonl each."""
    place = options.run / "place.jsonl"
    done = [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
    common = {
        "run": str(options.run), "model": options.model, "device": options.device, "threads": options.threads,
        "retain_batch": options.retain_batch,
    }  # fmt: skip

    started = {key(row) for row in done}

    def jobs() -> list[dict[str, Any]]:
        found = []
        for name in options.relations:
            chosen = options.chosen or choose(done, name)
            if not options.chosen:
                found.append({**common, "task": f"{name}-validation", "variant": "original", "settings": {}})
                trials = [
                    {**common, "task": f"{name}-validation", "variant": WITH, "settings": trial} for trial in TRIALS
                ]
                found.extend(trials)
            if chosen is None:
                continue
            for draw in options.draws:
                for arm, change in ARMS.items():
                    found.append({**common, "task": f"{name}-{draw}", "variant": arm, "settings": {**chosen, **change}})
        return [job for job in found if key(job) not in started]

    for row in pooled(work, jobs, key, started, options.workers, place):
        done.append(row)
        print(describe(row), flush=True)


def describe(row: dict[str, Any]) -> str:
    """A line about an edit."""
    parts = [
        row["task"],
        row["variant"],
        json.dumps(row["settings"]),
        f"{row['seconds']:.0f} s",
        str(row.get("weights", "")),
    ]
    for form, kinds in row["forms"].items():
        parts += [f"{form}:", *(f"{kind} {100 * mean(each['mc']):.0f}" for kind, each in kinds.items())]
        if read := row.get("by depth", {}).get(form):
            parts.append(f"{read['verdict']} (gone {read['facts_gone']:.2f}, opposition {read['opposition']:.3f})")
    return " ".join(parts)


def edits(done: list[dict[str, Any]]) -> pd.DataFrame:
    """A row an edit, as stored (in the file it is the same: its codes are the file's)."""
    rows = []
    for one in done:
        if one["variant"] not in ARMS:
            continue
        read, layers = one["by depth"]["stored"], one["by depth"]["stored"]["layers"]
        at = layers["judged"].index(True)
        row = {"model": one["model"], "task": one["task"], "arm": one["variant"], "device": one["device"]}
        full = vars(settings_of(METHOD, {**SHARED, "retain_batch": one["retain_batch"], **one["settings"]}))
        row |= {key: full[key] for key in NAMED}
        row |= {"weights": one["weights"], "edit_seconds": round(one["edit seconds"])}
        for kind, found in one["forms"]["stored"].items():
            row |= {f"{kind}, MC %": round(100 * mean(found["mc"]), 1), f"{kind}, log-odds": mean(found["log_odds"])}
        row["shipped forget, MC %"] = round(100 * mean(one["forms"]["shipped"]["forget"]["mc"]), 1)
        row |= {"layer": layers["layer"][at]}
        row |= {
            key: layers[key][at] for key in ("cad", "near_cad", "specificity", "specificity_low", "specificity_high")
        }
        row |= {key: read[key] for key in ("opposition", "facts_gone", "verdict", "why")}
        rows.append(row | {"shipped verdict": one["by depth"]["shipped"]["verdict"]})
    return pd.DataFrame(rows)


def page(table: pd.DataFrame) -> str:
    """The table of the documentation."""
    head = (
        "facts", "place", "differs in", "weights, %", "forget", "forget, other words", "near, kept back", "relearnt",
        "CAD", "near", "above near", "opposition", "verdict",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    common = {name: table[name].mode()[0] for name in NAMED if name != "place_weight"}
    for row in table.to_dict("records"):
        own = ", ".join(f"{name} {row[name]:g}" for name, usual in common.items() if row[name] != usual)
        asked = [row[f"{kind}, MC %"] for kind in ("forget", "forget, other words", "near, kept back", "relearned")]
        cells = [
            str(row["task"]).rsplit("-", 1)[-1], "yes" if row["arm"] == WITH else "no", own,
            f"{row['weights'] / LINEAR:.2%}".rstrip("%"), *("" if pd.isna(x) else f"{x:.0f}" for x in asked),
            f"{row['cad']:.2f}", f"{row['near_cad']:.2f}",
            f"{row['specificity']:.2f} [{row['specificity_low']:.2f}, {row['specificity_high']:.2f}]",
            f"{row['opposition']:.3f}", row["verdict"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pairs(done: list[dict[str, Any]]) -> pd.DataFrame:
    """What the arms differ in at the same settings of a draw: `real_ablations.table`, against the edit with the place."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in done:
        if row["variant"] in ARMS and not row["task"].endswith("validation"):
            common = {name: value for name, value in row["settings"].items() if name != "place_weight"}
            arms.setdefault(key({**row, "variant": "", "settings": common}), []).append(row)
    rows = [
        {"task": row["task"], "variant": row["variant"], "scores": row["forms"]["stored"]}
        for each in arms.values()
        if len(each) == len(ARMS)
        for row in each
    ]
    return table(rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--relations", nargs="+", default=["landmark_in_country"])
    parser.add_argument("--draws", nargs="*", default=["0", "1", "2"])
    parser.add_argument("--retain-batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chosen", type=json.loads, help="settings as JSON, chosen elsewhere: no trials are run")
    parser.add_argument("--out", type=Path, help="a table of every edit that is there")
    parser.add_argument("--pairs", type=Path, help="a table of what the arms differ in")
    options = parser.parse_args()
    run(options)
    done = [json.loads(line) for line in (options.run / "place.jsonl").read_text().splitlines()]
    for place, made in ((options.out, edits), (options.pairs, pairs)):
        if place:
            made(done).to_csv(place, index=False, float_format="%.3f")


if __name__ == "__main__":
    main()
