"""Exact edge patching: 20 circuits at once against one, and against plain forward passes; minimality; memory.

`python -m tests.benchmarks.circuits` (three minutes on one core).
"""

from __future__ import annotations

import subprocess
import sys

import torch

import mansu_tl as mtl
from mansu_tl.circuit import Circuit, Graph, minimality, random_mask
from mansu_tl.circuit.evaluation import relative
from mansu_tl.circuit.selection import top_mask
from mansu_tl.runs.passes import run
from tests.benchmarks.common import gpt2_small, random_pairs, side_by_side


def rows(what: str, model: object, pairs: mtl.data.PromptPairs) -> list[dict[str, object]]:
    """Time of `faithfulness` of 20 circuits together over that of one, by kind of circuits."""
    exists = Graph.of(model).exists
    total, scores = int(exists.sum()), mtl.edge_attribution(model, pairs)
    sizes = sorted({round(total ** (i / 19)) for i in range(20)})
    few, many = max(1, total // 300), total // 20
    sets = {
        f"20 sizes, 1..{total} (as in discover_circuit), against one of each": [top_mask(scores, n) for n in sizes],
        f"20 random circuits of {few} edges": [random_mask(exists, few, seed) for seed in range(20)],
        f"20 random circuits of {many} edges": [random_mask(exists, many, seed) for seed in range(20)],
        f"20 random circuits of {total // 2} edges": [random_mask(exists, total // 2, seed) for seed in range(20)],
        f"top {few}..{few + 19} edges": [top_mask(scores, few + i) for i in range(20)],
    }
    out = []

    def measure(masks: torch.Tensor) -> None:
        relative(model, masks, pairs, None, mtl.runs.logit_difference, 64)

    def plain() -> None:
        with torch.no_grad():
            run(model, pairs.clean, pairs.lengths)

    for name, chosen in sets.items():
        masks = torch.stack(chosen).float()
        singles = masks if "of each" in name else masks[:1]
        one, twenty = side_by_side(lambda m=singles: [measure(x[None]) for x in m], lambda m=masks: measure(m), 2)
        one /= len(singles)
        base, _ = side_by_side(plain, lambda: None, 3)
        out.append(
            {
                "what": f"{what}: {name}",
                "one (s)": one,
                "twenty (s)": twenty,
                "twenty / one": twenty / one,
                "twenty / forward": twenty / base,
            }
        )
    circuit = Circuit.top(scores, max(60, few))
    base, seconds = side_by_side(plain, lambda: minimality(model, circuit, pairs), 1)
    what = f"{what}: minimality of {circuit.n_edges} edges and {len(circuit.nodes)} nodes, per circuit measured"
    each = seconds / (circuit.n_edges + len(circuit.nodes))
    return [*out, {"what": what, "one (s)": each, "twenty (s)": 20 * each, "twenty / forward": 20 * each / base}]


def peak_mb(edges: int) -> float:
    """Extra memory of 20 random circuits at once on the GPT-2-small size, in a fresh process."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "import mansu_tl as mtl\n"
        "from mansu_tl.circuit import Graph, patch_edges, random_mask\n"
        "from tests.benchmarks.common import *\n"
        "model, pairs = mtl.load(gpt2_small()), random_pairs(8, 16, 50_000, (3, 7))\n"
        "exists = Graph.of(model).exists\n"
        f"masks = torch.stack([random_mask(exists, {edges}, seed) for seed in range(20)]).float()\n"
        "print(extra_peak_mb(lambda: patch_edges(model, pairs, masks)))"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    import pandas as pd

    torch.set_num_threads(1)
    pocket = mtl.load("pocket")
    frame = rows("pocket, its 192 pairs", pocket, mtl.load_task("pocket").forget_pairs)
    frame += rows("GPT-2-small size, 8 x 16 tokens", mtl.load(gpt2_small()), random_pairs(8, 16, 50_000, (3, 7)))
    for edges in (1624, 16_245):
        what = f"GPT-2-small size, 20 random circuits of {edges} edges: extra peak memory {peak_mb(edges):.0f} MB"
        frame.append({"what": what})
    print(pd.DataFrame(frame).to_string(index=False, float_format="{:.2f}".format))
