"""What each part of MANSU's closed form is worth on a pretrained model: `python scripts/real_ablations.py RUN`.

RUN is the folder of `real_evidence.py tasks` and `run` (tasks and circuits). On every draw the settings that were chosen are
run whole, and with one part changed: null space off, Fisher on, a quarter of each circuit MLP's neurons, and as many drawn
at random in the same layers. Every edit is asked, and with `--attack` relearnt too: half of its facts are trained on, the
others asked. Each cell is one line of RUN/ablations.jsonl; what is there is not done again. `--out TABLE.csv` writes
differences to the whole, with intervals over facts and draws. The primary endpoint is one number: log-odds of the near facts
that were kept back less those of the forget facts. Its differences have a p (sign flips over facts and draws) and the same
after Holm's correction for all variants.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import torch

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.results.intervals import fact_weights, middle
from mansu_tl.results.significance import holm, sign_flip
from mansu_tl.unlearning import settings_of
from mansu_tl.verification import attack_splits, relearn
from scripts.real_evidence import read

WHOLE = {"quantizer": "gguf", "null_space": 50.0}
QUARTER, QUARTER_OWN = {"neuron_share": 0.25}, "a quarter of the neurons, the circuit's"
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "whole": ({}, 0),
    "null space off": ({"null_space": 0.0}, 0),
    QUARTER_OWN: (QUARTER, 0),
    **{f"a quarter, drawn, {i}": ({**QUARTER, "restrict": "matched"}, i) for i in range(5)},
    "Fisher on": ({"fisher": True}, 0),
}
PRIMARY, KEPT, GONE = "near, kept back, less forget", "near, kept back", "forget"
ASKED = ("forget", "forget, other words", "near", "near, kept back", "retain")
RATE, STEPS = 1e-5, 30


def cell(model: Any, run: Path, name: str, variant: str, attacked: bool, device: str) -> dict[str, Any]:
    """One edit, asked and perhaps attacked."""
    start = time.monotonic()
    task, asked = read(run / f"{name}.json", model, device)
    changes, seed = VARIANTS[variant]
    settings = settings_of("mansu-closed", {**WHOLE, **changes})
    circuit = Circuit.load(run / f"{name}.circuit.safetensors")
    edit = mtl.unlearn(model, task, "mansu-closed", settings=settings, seed=seed, circuit=circuit)
    edited = edit.apply(model)
    out: dict[str, Any] = {"task": name, "variant": variant, "weights": edit.n_weights, "scores": {}}
    for kind in ASKED:
        found = mtl.accuracy(edited, asked[kind])
        out["scores"][kind] = {
            "fact": list(found.facts),
            "mc": found.multiple_choice.float().tolist(),
            "log_odds": [round(x, 4) for x in found.log_odds.tolist()],
        }
    if not attacked:
        return {**out, "seconds": time.monotonic() - start}
    (attack,) = attack_splits(task, k=len(set(task.forget_pairs.facts)) // 2, splits=1)
    curve = relearn(edited, attack, steps=STEPS, learning_rate=RATE, batch_size=16, ask_at=(0, STEPS))
    out["scores"]["relearned"] = {
        "fact": list(curve.facts),
        "mc": curve.values[0, -1].tolist(),
        "log_odds": curve.values[2, -1].tolist(),
    }
    return {**out, "seconds": time.monotonic() - start}


def _kind(variant: str) -> str:
    """A variant without the number of its draw."""
    return variant.rpartition(", ")[0] if "drawn" in variant else variant


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Every score of every variant, and how far it is from the whole on the same draws: 95 % over draws' facts."""
    frame = pd.DataFrame(
        [
            {"task": row["task"], "variant": _kind(row["variant"]),
             "draw": row["variant"], "questions": kind, "measure": measure, "fact": f"{row['task']}: {fact}", "value": value}
            for row in rows
            for kind, each in row["scores"].items()
            for measure in ("mc", "log_odds")
            for fact, value in zip(each["fact"], each[measure], strict=True)
        ]
    )  # fmt: skip
    frame["relation"] = frame["task"].str.rpartition("-")[0]
    own = frame.groupby(["relation", "questions", "measure", "variant", "fact"])["value"].mean()
    out = []
    for (relation, kind, measure, variant), values in own.groupby(level=[0, 1, 2, 3]):
        values = values.droplevel([0, 1, 2, 3])
        against = _against(variant)
        base = own.loc[relation, kind, measure, against].reindex(values.index)
        both = pd.DataFrame({"value": values, "difference": values - base}).dropna()
        scale = 100.0 if measure == "mc" else 1.0
        numbers = scale * torch.tensor(both.to_numpy(), dtype=torch.float64)
        weights = fact_weights(torch.arange(len(both)), 0)
        draws = (weights / weights.sum(1, keepdim=True)) @ numbers
        row: dict[str, Any] = {"relation": relation, "variant": variant, "questions": kind, "measure": measure}
        part = frame[(frame.relation == relation) & (frame.variant == variant)]
        row |= {"edits": part["task"].astype(str).str.cat(part["draw"]).nunique(), "facts": len(both)}
        for i, key in enumerate(both.columns):
            low, high = middle(draws[:, i])
            row |= {key: numbers[:, i].mean().item(), f"{key}_low": low, f"{key}_high": high}
        out.append({**row, "against": against})
    primary = [row for relation in own.index.unique("relation") for row in _primary(frame, own.loc[relation], relation)]
    return pd.DataFrame([*out, *primary])


def _against(variant: str) -> str:
    return QUARTER_OWN if "drawn" in variant else "whole"


def _primary(frame: pd.DataFrame, own: pd.Series, relation: str) -> list[dict[str, Any]]:
    """The primary endpoint of every variant of a relation, beside what it is compared with on the same draws."""
    log_odds = {kind: own.loc[kind, "log_odds"].unstack("variant") for kind in (KEPT, GONE)}
    rows = []
    for variant in log_odds[KEPT].columns:
        against, parts = _against(variant), []
        for kind, sign in ((KEPT, 1.0), (GONE, -1.0)):
            both = log_odds[kind][[variant, against]].set_axis([0, 1], axis=1).dropna()
            values = torch.tensor(both.to_numpy().copy(), dtype=torch.float64)
            weights = fact_weights(torch.arange(len(values)), len(parts))
            parts.append((sign * values, sign * weights @ values))
        mean = sum(each.mean(0) for each, _ in parts)
        draws = sum(each for _, each in parts)
        terms = torch.cat([(each[:, 0] - each[:, 1]) / len(each) for each, _ in parts])
        part = frame[(frame.relation == relation) & (frame.variant == variant)]
        row = {"relation": relation, "variant": variant, "questions": PRIMARY, "measure": "log_odds"}
        row |= {"edits": part["task"].astype(str).str.cat(part["draw"]).nunique(), "facts": len(terms)}
        for name, value, drawn in (
            ("value", mean[0], draws[:, 0]), ("difference", mean[0] - mean[1], draws[:, 0] - draws[:, 1]),
        ):  # fmt: skip
            low, high = middle(drawn)
            row |= {name: float(value), f"{name}_low": low, f"{name}_high": high}
        rows.append({**row, "against": against, "p": sign_flip(terms) if variant != against else float("nan")})
    tested = [row for row in rows if row["variant"] != row["against"]]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="*", default=[f"landmark_in_country-{i}" for i in range(3)])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--attack", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = options.run / "ablations.jsonl"
    rows = [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
    done = {(row["task"], row["variant"]) for row in rows}
    wanted = [(name, variant) for variant in options.variants for name in options.tasks]
    model = mtl.load(options.model, device=options.device) if set(wanted) - done else None
    for name, variant in wanted:
        if (name, variant) in done:
            continue
        row = cell(model, options.run, name, variant, options.attack, options.device)
        rows.append(row)
        with place.open("a") as file:
            file.write(json.dumps(row) + "\n")
        means = {kind: round(100 * sum(each["mc"]) / len(each["mc"])) for kind, each in row["scores"].items()}
        print(f"{row['seconds']:6.0f} s  {name}, {variant}: {row['weights']} weights, {means}", flush=True)
    if options.out:
        table(rows).to_csv(options.out, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
