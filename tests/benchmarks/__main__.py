"""Every speed figure of the circuit engine in one table: `python -m tests.benchmarks` (about ten minutes on one core).

Ratios are measured side by side in one process; `--transformer-lens` adds the comparison with its edge attribution
(a minute more), `--markdown` prints for a README. Edges to faithfulness are `discovery.py`, a GPU's figures
`llama8b.py`.
"""

from __future__ import annotations

import sys

import pandas as pd

import mansu_tl as mtl
from tests.benchmarks import attribution, circuits, patching
from tests.benchmarks.common import gpt2_small, random_pairs


def main() -> None:
    """Print the table."""
    parts = [attribution.rows("--transformer-lens" in sys.argv), patching.rows()]
    small = mtl.load(gpt2_small()), random_pairs(8, 16, attribution.VOCAB, (3, 7))
    pocket = mtl.load("pocket"), mtl.load_task("pocket").forget_pairs[:8]
    for name, (model, pairs) in (("GPT-2-small size", small), ("pocket", pocket)):
        found = circuits.rows(name, model, pairs)
        parts.append(
            [
                {"what": f"{row['what']}: twenty / one", "measured": f"{row['twenty / one']:.1f}", "target": "<= 3"}
                for row in found
                if "twenty / one" in row
            ]
        )
    table = pd.DataFrame([row for part in parts for row in part])
    if "--markdown" in sys.argv:
        for row in table.itertuples():
            print(f"| {row.what} | {row.measured} | {row.target} |")
    else:
        print(table.to_string(index=False, max_colwidth=120))


if __name__ == "__main__":
    main()
