"""The circuit in three stages on a pretrained model.

    python scripts/real_stages.py RUN --out figures/tables/real_stages.safetensors

RUN is the folder of `make demo-real`. Takes from it the circuit and its edges' scores (EAP-IG, recomputed by the run in
every edited model, as stored and with the file's codes), and keeps the edges that are strongest in the original. No model is
loaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mansu_tl.circuit import Circuit
from mansu_tl.verification import CircuitStages, Divergence

ROWS = {"GradDiff": "graddiff", "MANSU": "mansu-closed"}
STAGES = {"edited": "full", "shipped as Q4_1": "gguf"}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--edges", type=int, default=1000)
    options = parser.parse_args()
    found = {
        row: {
            stage: Divergence.load(options.run / "scores" / method / f"cad_{name}.safetensors")
            for stage, name in STAGES.items()
        }
        for row, method in ROWS.items()
    }
    circuit = Circuit.load(options.run / "circuit" / "circuit.safetensors")
    stages = CircuitStages.of(circuit, found, options.edges)
    print(f"{stages}\n{stages.to_dataframe().to_string(index=False)}\nwritten: {stages.save(options.out)}")


if __name__ == "__main__":
    main()
