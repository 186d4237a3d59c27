"""MANSU floored on one grid and on several at once: `python scripts/floors.py OUT --seeds 1 2 --out TABLE.csv`.

An edit that crosses NF4's boundaries need not cross another grid's. Here the floor holds for NF4, for NF4 and a grid that
has a zero point, and for four grids, each with the light settings; every edit is then stored in every 4-bit format with
cells that fits `pocket`, floored or not. Written is by how much the forget answers come back (PTQ gap), with intervals over
facts and seeds, and how many of the changed weights changed their code there. Edits are kept in OUT.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.errors import MansuError
from mansu_tl.quantization import quantizer_table, update_statistics
from mansu_tl.results.intervals import with_interval
from mansu_tl.unlearning import Edit, MansuSettings, unlearn

FLOORS = ("nf4", "nf4+int4-asym-g64", "nf4+fp4+int4-g64+int4-asym-g64")


def formats() -> list[str]:
    """The 4-bit quantizers with cells."""
    table = quantizer_table()
    return list(table.quantizer[(table.kind == "grid") & (table.bits == "4")])


def cells_of(model: Any, edited: Any, task: Any, name: str) -> dict[str, Any] | None:
    """One edit in one format; None where the format does not fit the model."""
    try:
        shipped = mtl.quantize(edited, name)
    except MansuError:
        return None
    stored, found = (mtl.accuracy(each, task.questions["forget"]) for each in (edited, shipped))
    moved = update_statistics(model, edited, name).to_dataframe().iloc[-1]
    return {
        "facts": list(found.facts),
        "MC": found.multiple_choice.double() - stored.multiple_choice.double(),
        "log-odds": found.log_odds.double() - stored.log_odds.double(),
        "changed": float(moved.changed),
        "codes": float(moved.codes_changed),
    }


def page(table: pd.DataFrame) -> str:
    """The table of the documentation: by how much each format brings answers back, and the share of codes that changed."""
    floors = list(dict.fromkeys(table.floor))
    lines = ["| format | " + " | ".join(floors) + " |", "| --- " * (len(floors) + 1) + "|"]
    for name in dict.fromkeys(table.format):
        cells = []
        for floor in floors:
            (row,) = table[(table.format == name) & (table.floor == floor)].to_dict("records")
            # Adding nothing takes the minus off a rounded zero.
            points = [f"{round(row[f'PTQ gap, MC, points{end}'], 1) + 0.0:.1f}" for end in ("", "_low", "_high")]
            cells.append("{} [{}, {}]; {:.0f} %".format(*points, row["changed weights whose code changed, %"]))
        lines.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, rows = time.monotonic(), []
    model, task = mtl.load("pocket"), mtl.load_task("pocket")
    options.folder.mkdir(parents=True, exist_ok=True)
    place = options.folder / "circuit.safetensors"
    if not place.exists():
        mtl.discover_circuit(model, task.forget_pairs, faithfulness=0.85).save(place)
    for floor in FLOORS:
        edits = []
        for seed in options.seeds:
            kept = options.folder / f"{floor}-{seed}.safetensors"
            if not kept.exists():
                settings = MansuSettings.light(quantizer=floor)
                unlearn(model, task, "mansu", settings=settings, seed=seed, circuit=Circuit.load(place)).save(kept)
            edits.append(Edit.load(kept).apply(model))
            print(f"{time.monotonic() - start:6.0f} s  {floor}, seed {seed}", flush=True)
        own = [mtl.accuracy(each, task.questions["forget"]).mc_percent for each in edits]
        near = [mtl.accuracy(each, task.questions["near"]).log_odds.double().mean().item() for each in edits]
        for name in formats():
            cells = [cells_of(model, each, task, name) for each in edits]
            found = [each for each in cells if each is not None]
            if not found:
                continue
            facts = [f"{i} {fact}" for i, each in enumerate(found) for fact in each["facts"]]
            row: dict[str, Any] = {"floor": floor, "format": name, "floored": name in floor.split("+")}
            row |= {"edits": len(edits), "forget MC as stored, %": sum(own) / len(own)}
            row["near log-odds as stored, nats"] = sum(near) / len(near)
            for measure, scale, unit in (("MC", 100.0, "points"), ("log-odds", 1.0, "nats")):
                values = torch.cat([each[measure] for each in found])
                row |= with_interval(f"PTQ gap, {measure}, {unit}", values, facts, scale=scale)
            changed = sum(each["changed"] for each in found)
            row["changed weights whose code changed, %"] = 100 * sum(each["codes"] for each in found) / changed
            rows.append(row)
        pd.DataFrame(rows).to_csv(options.out, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
