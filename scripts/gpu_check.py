"""Runs the whole road on a GPU and compares it with the CPU: `python scripts/gpu_check.py`, under three minutes.

Tiny random models of all seven families in float32 and bfloat16, one in float16, and `pocket` with README's lines. The
CPU's numbers are computed meanwhile by other processes. A table says for every model and stage how long the GPU took and
the largest difference to the CPU (as a share of the largest number); exit status 1 if one is too large or anything raised.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# What cuBLAS asks for under deterministic algorithms, before it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import mansu_tl as mtl
from mansu_tl.models import fingerprint
from mansu_tl.verification import certify
from tests.road import STAGES, TOLERANCE, Numbers, case, largest_difference
from tests.tiny import FAMILIES

# The families differ in how their blocks are run; what works on weights and texts alone is walked on two of them.
SCORING = ("accuracy", "edge scores", "node and neuron scores", "patching sweeps", "circuits", "MANSU")
FULL = ("llama", "gpt2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Job:
    """One model, and the stages that are walked on it."""

    family: str
    dtype: str
    stages: tuple[str, ...]


def jobs(families: Sequence[str], every: bool) -> list[Job]:
    """What is walked: all stages where a family is one of `FULL`, or if every one is asked for."""
    wanted = [
        Job(family, dtype, tuple(STAGES) if every or family in FULL else SCORING)
        for family in families
        for dtype in ("float32", "bfloat16")
    ]
    return [*wanted, Job(families[0], "float16", SCORING)]


def reference(job: Job) -> dict[str, Numbers]:
    """The CPU's numbers of one job."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    there = case(job.family, "cpu", DTYPES[job.dtype])
    return {stage: STAGES[stage](there) for stage in job.stages}


def pocket(device: str) -> dict[str, Numbers]:
    """README's lines on `pocket`, with few steps; bitsandbytes certifies the edit."""
    model, task = mtl.load("pocket", device=device), mtl.load_task("pocket")
    pairs = task.forget_pairs
    circuit = mtl.discover_circuit(model, pairs, faithfulness=0.85)
    edit = mtl.unlearn(
        model, task, "mansu", circuit=circuit, settings=mtl.unlearning.MansuSettings.light(steps=60), seed=0
    )
    edited = edit.apply(model)
    quantized = mtl.quantize(edited, "nf4")
    cad = mtl.circuit_divergence(model, quantized, circuit, pairs)
    card = mtl.scorecard(model, edited, task, circuit, quantizers=["nf4"])
    with tempfile.TemporaryDirectory() as folder:
        before, after = mtl.save(model, Path(folder, "a")), mtl.save(edited, Path(folder, "b"))
        certificate = certify(before, after, edit.indices)
        same = fingerprint(mtl.load(after)) == fingerprint(edited)
    asked = {name: mtl.accuracy(m, task.questions["forget"]).mc_percent / 100 for name, m in
             {"original": model, "edited": edited, "quantized": quantized}.items()}  # fmt: skip
    return {
        "discover_circuit": {
            "edges": torch.tensor(float(circuit.n_edges)),
            "faithfulness": torch.tensor(circuit.faithfulness),
        },
        # Hundreds of steps part ways over a last bit: behaviour is compared, as a share of all questions.
        "unlearn, quantize, accuracy": {"of 1": torch.tensor(1.0), **{k: torch.tensor(v) for k, v in asked.items()}},
        "CAD": {"value": torch.tensor(cad.value)},
        "certificate": {"passed": torch.tensor(float(certificate.passed and same and len(card.rows) > 0))},
    }


def deterministic(device: str) -> Numbers:
    """Scores, an edit and relearning twice under deterministic algorithms: the same bits, and nothing refused."""
    torch.use_deterministic_algorithms(True)
    try:
        there = case("llama", device)
        names = ("edge scores", "circuits", "MANSU", "relearning, probes, depth, damage")
        first, second = ({name: STAGES[name](there) for name in names} for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    equal = [
        torch.equal(a, second[name][key]) for name in names for key, a in first[name].items() if not a.isnan().any()
    ]
    return {"unequal": torch.tensor([float(equal.count(False))])}


class Table:
    """Lines as they come, and whether any of them failed."""

    def __init__(self) -> None:
        self.failed = 0
        self.line("model", "stage", "seconds", "difference", "ok", "")

    def line(self, *cells: str) -> None:
        """One line."""
        widths = (18, 36, 9, 12, 5)
        print(*(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False)), *cells[5:], flush=True)

    def add(
        self, model: str, stage: str, run: Callable[[], Numbers], expected: Callable[[], Numbers], most: float
    ) -> None:
        """Run one stage and compare it."""
        start = time.monotonic()
        try:
            found = run()
            seconds = time.monotonic() - start
            worst, where = largest_difference(found, expected())
            good, note = worst <= most, "" if worst <= most else f"{where}, allowed {most:g}"
        except Exception as error:
            seconds, worst, good = time.monotonic() - start, float("nan"), False
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "mansu_tl" in f.filename]
            place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
            note = f"{type(error).__name__}: {' '.join(str(error).split())[:160]} {place}"
        self.failed += not good
        self.line(model, stage, f"{seconds:.1f}", f"{worst:.1e}", "ok" if good else "FAIL", note)


def main(arguments: Sequence[str] | None = None) -> int:
    """Walk everything and print the table; the number of failures decides the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (cpu compares the CPU with itself)")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--every-stage", action="store_true", help="all stages on every family")
    parser.add_argument("--no-pocket", action="store_true")
    parser.add_argument("--workers", type=int, default=max(1, min(16, os.cpu_count() or 1) - 1))
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu compares the CPU with itself")
        return 1
    warnings.simplefilter("ignore")
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 8))
    start, precision = time.monotonic(), _precision()
    name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}, tolerance {', '.join(f'{k}: {v:g}' for k, v in TOLERANCE.items())}")
    wanted, table = jobs(options.families.split(","), options.every_stage), Table()
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        there: Future[dict[str, Numbers]] | None = None if options.no_pocket else pool.submit(pocket, "cpu")
        references = [pool.submit(reference, job) for job in wanted]
        for job, expected in zip(wanted, references, strict=True):
            dtype, title = DTYPES[job.dtype], f"{job.family} {job.dtype}"
            try:
                model = case(job.family, options.device, dtype)
            except Exception as error:
                table.failed += 1
                table.line(title, "load", "", "", "FAIL", f"{type(error).__name__}: {str(error)[:160]}")
                continue
            for stage in job.stages:
                table.add(title, stage, partial(STAGES[stage], model), partial(_of, expected, stage), TOLERANCE[dtype])
        twice = partial(deterministic, options.device)
        table.add("llama float32", "deterministic, twice", twice, lambda: {"unequal": torch.zeros(1)}, 0.0)
        if there is not None:
            found = pocket_stages(options.device, table)
            for stage, numbers in found.items():
                most = 0.06 if stage != "certificate" else 0.0
                table.add("pocket", stage, partial(dict, numbers), partial(_of, there, stage), most)
    if _precision() != precision:
        table.failed += 1
        table.line("", "TF32 or matmul precision", "", "", "FAIL", f"{precision} became {_precision()}")
    print(f"{table.failed} failed, {time.monotonic() - start:.0f} s")
    return int(table.failed > 0)


def _of(expected: Future[dict[str, Numbers]], stage: str) -> Numbers:
    return expected.result()[stage]


def pocket_stages(device: str, table: Table) -> dict[str, Numbers]:
    """README's lines on the device, or a line that says why they do not run."""
    start = time.monotonic()
    try:
        found = pocket(device)
    except Exception as error:
        table.failed += 1
        table.line("pocket", "README's lines", "", "", "FAIL", f"{type(error).__name__}: {str(error)[:160]}")
        return {}
    table.line("pocket", "README's lines", f"{time.monotonic() - start:.1f}", "", "", "")
    return found


def _precision() -> tuple[bool, bool, str]:
    backends = torch.backends
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


if __name__ == "__main__":
    raise SystemExit(main())
