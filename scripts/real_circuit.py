"""The circuit of a pretrained model's facts: on what it was not found on, against near facts and random edges, in depth.

    python scripts/real_circuit.py OUT --task FILE --task FILE      appends to OUT/real_circuit.csv, task by task

Tasks are those of `real_evidence.py tasks`; a circuit that lies beside one (`.circuit.safetensors`) is read, else found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd

import mansu_tl as mtl
from mansu_tl.circuit import Circuit, Graph
from mansu_tl.circuit.evaluation import faithfulness, random_faithfulness
from mansu_tl.data import PromptPairs
from mansu_tl.patching.reading import read_layer, subject_share

TARGET, DRAWS, MOST = 0.85, 5, 24


def pairs_of(model: Any, rows: list[dict[str, Any]], kind: str, held_out: bool, most: int) -> PromptPairs:
    """Some rows of a task as pairs."""
    found = [row for row in rows if row["set"] == kind and row["held_out"] == held_out][:most]
    return PromptPairs.from_text(
        model, [row["clean"] for row in found], [row["corrupt"] for row in found], [row["answer"] for row in found],
        [row["distractors"] for row in found], facts=[row["fact"] for row in found],
    )  # fmt: skip


def measured(model: Any, place: Path) -> list[dict[str, Any]]:
    """All rows of one task."""
    rows = json.loads(place.read_text())["rows"]
    kept = place.with_suffix(".circuit.safetensors")
    asked = {
        "forget": pairs_of(model, rows, "forget", False, MOST),
        "forget, other wording": pairs_of(model, rows, "forget", True, MOST),
        "near": pairs_of(model, rows, "near", False, MOST),
        "far": pairs_of(model, rows, "retain", False, MOST),
    }
    found = {kind: asked[kind] for kind in ("forget", "near", "far")}
    circuits = {
        kind: Circuit.load(kept)
        if kind == "forget" and kept.exists()
        else mtl.discover_circuit(model, pairs, faithfulness=TARGET)
        for kind, pairs in found.items()
    }
    own, out = circuits["forget"], []
    relation, part = place.stem.rsplit("-", 1)

    def add(measure: str, of: str, on: str, value: float, layer: int | str = "") -> None:
        out.append(
            {
                "relation": relation,
                "part": part,
                "measure": measure,
                "of": of,
                "on": on,
                "layer": layer,
                "value": f"{value:.4f}",
            }
        )

    total = int(Graph.of(model).exists.sum())
    for kind, one in circuits.items():
        add("edges", kind, "", one.n_edges)
        add("share of all edges", kind, "", one.n_edges / total)
        if kind != "forget":
            add("jaccard", kind, "forget", own.jaccard(one))
            share, size = own.n_edges / total, one.n_edges / total
            add(
                "jaccard of random circuits of these sizes",
                kind,
                "forget",
                share * size / (share + size - share * size),
            )
    for on, pairs in asked.items():
        for of, one in circuits.items():
            add("faithfulness", of, on, faithfulness(model, one, pairs))
        if on in ("forget", "forget, other wording"):
            for value in random_faithfulness(model, own, pairs, seeds=DRAWS):
                add("faithfulness", "random edges", on, value)
    for on, pairs in asked.items():
        share = subject_share(model, pairs)
        add("read layer", "model", on, read_layer(share))
        for layer, value in enumerate(share.tolist()):
            add("evidence on the subject", "model", on, value, layer)
    return out


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", type=Path, action="append", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model, file = mtl.load(options.model, device=options.device), options.out / "real_circuit.csv"
    for place in options.task:
        rows = pd.DataFrame(measured(model, place))
        rows.to_csv(file, mode="a", header=not file.exists(), index=False)
        print(place.stem, rows[rows.layer == ""][["measure", "of", "on", "value"]].to_string(), flush=True)


if __name__ == "__main__":
    main()
