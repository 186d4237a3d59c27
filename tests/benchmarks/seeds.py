"""MANSU on several seeds and both bases: the table of README. `python tests/benchmarks/seeds.py figures/seeds.csv`.

About a minute a seed and base on one core.
"""

from __future__ import annotations

import sys

import pandas as pd
from tqdm.auto import tqdm

import mansu_tl as mtl
from mansu_tl.files import write_text
from mansu_tl.verification import circuit_scores

SEEDS, BASES = range(5), ("pocket", "pocket-fp")


def main(out: str) -> None:
    """Write every scorecard row of every seed to one table, and print the means and ranges."""
    task, frames = mtl.load_task("pocket"), []
    bar = tqdm(total=len(SEEDS) * len(BASES), unit="edit")
    for base in BASES:
        model = mtl.load(base)
        circuit = mtl.discover_circuit(model, task.forget_pairs)
        before = circuit_scores(model, circuit, task.forget_pairs)
        for seed in SEEDS:
            edit = mtl.unlearn(model, task, "mansu", circuit=circuit, seed=seed)
            card = mtl.scorecard(
                model, edit.apply(model), task, circuit, quantizers=["nf4"], title="MANSU", original_scores=before
            )
            frame = card.to_dataframe()
            frame.insert(0, "seed", seed)
            frame.insert(0, "base", base)
            frame["edited_share"] = edit.linear_share(model)
            for key in ("retain_increase_measured", "retain_increase_fisher"):
                frame[key] = edit.facts[key]
            frames.append(frame)
            bar.update()
    table = pd.concat(frames, ignore_index=True)
    write_text(out, table.to_csv(index=False))
    groups = table.fillna({"quantizer": ""}).groupby(["property", "measure", "quantizer", "base"], sort=False)["value"]
    print(groups.agg(["mean", "min", "max"]).round(2).to_string())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "figures/seeds.csv")
