"""What `notebooks/08_real_model.ipynb` reads instead of computing: `python -m tests.notebook_cache RUN`.

RUN is the folder of a finished `mansu-tl demo-real`. GradDiff's edit moves every weight and is left out; what was measured
of it is kept.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from mansu_tl.circuit import Circuit, EdgeScores
from mansu_tl.patching import PatchingResult
from mansu_tl.unlearning import Edit
from mansu_tl.verification import CadByDepth, Scorecard

CACHE = Path(__file__).resolve().parents[1] / "notebooks" / "08_real_model"
METHODS = ("mansu-closed", "graddiff")


def keep(run: Path, to: Path = CACHE) -> None:
    """Read the run's results and write those that the notebook shows."""
    (task,) = run.glob("task_*.jsonl")
    to.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(task, to / "task.jsonl")
    edit = Edit.load(run / "edits" / "mansu-closed" / "edit.safetensors")
    # No matrix of this model has so many weights that 64 bits are needed to number them.
    replace(edit, indices={name: index.int() for name, index in edit.indices.items()}).save(to / "mansu.safetensors")
    Circuit.load(run / "circuit" / "circuit.safetensors").save(to / "circuit.safetensors")
    EdgeScores.load(run / "circuit" / "scores.safetensors").save(to / "scores.safetensors")
    PatchingResult.load(run / "circuit" / "patching.safetensors").save(to / "patching.safetensors")
    card = f"scorecard{Scorecard.suffix}"
    Scorecard.load(run / "scores" / "mansu-closed" / card).save(to / f"mansu-closed_{card}")
    for method in METHODS:
        for form in ("full", "gguf"):
            name = f"depth_{form}{CadByDepth.suffix}"
            CadByDepth.load(run / "scores" / method / name).save(to / f"{method}_{name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    keep(parser.parse_args().run)
