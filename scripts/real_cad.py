"""CAD by depth on a pretrained model: `python scripts/real_cad.py RUN --out figures/tables/real_cad.csv`.

RUN is the folder of `make demo-real` (or of any study of a GGUF model): every method's edit in it is read by the original's
gradients, applied and from the file that was written, by layer and edge by edge on the run's circuit. Near pairs are the
task's near facts in the wording that is trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.unlearning import Edit
from mansu_tl.verification import DepthReader
from scripts.real_circuit import pairs_of

TITLES = {"graddiff": "GradDiff", "mansu-closed": "MANSU, closed form"}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start, (file,) = time.monotonic(), options.run.glob("task*.jsonl")
    model = mtl.load(options.model, device=options.device)
    rows = [{"held_out": False, **json.loads(line)} for line in file.read_text(encoding="utf-8").splitlines()]
    task = mtl.load_task(file, tokenizer=model)
    circuit = Circuit.load(options.run / "circuit" / "circuit.safetensors")
    reader = DepthReader(model, task.forget_pairs, pairs_of(model, rows, "near", False, len(rows)), circuit=circuit)
    tables = []
    for place in sorted(options.run.glob("edits/*/edit.safetensors")):
        method = place.parent.name
        title = TITLES.get(method, method)
        shipped = mtl.load(options.run / "model" / f"{method}.gguf", tokenizer=model.tokenizer, device=options.device)
        for label, one in ((title, Edit.load(place).apply(model)), (f"{title}, shipped", shipped)):
            found = reader.read(one, label=label)
            whole = {
                "opposition": (found.opposition, found.opposition_interval),
                "edge_cad": (found.edge_cad, found.edge_interval),
            }
            columns = {"verdict": found.verdict().name, "facts_gone": found.facts_gone}
            for name, (value, (low, high)) in whole.items():
                columns |= {name: value, f"{name}_low": low, f"{name}_high": high}
            tables.append(found.to_dataframe().assign(**columns))
            low, high = found.edge_interval
            print(f"{time.monotonic() - start:6.0f} s  {found}\n  {found.verdict()}", flush=True)
            gone = f"{100 * found.facts_gone:.0f} % of facts gone"
            print(f"  edge by edge {found.edge_cad:.2f} [{low:.2f}, {high:.2f}], {gone}", flush=True)
    pd.concat(tables).to_csv(options.out, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
