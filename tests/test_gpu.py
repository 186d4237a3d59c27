"""The road on a real GPU against the CPU: `pytest -m gpu`, skipped where there is none. See `scripts/gpu_check.py` too."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

import mansu_tl as mtl
from mansu_tl.models import fingerprint
from scripts import gpu_check
from tests.road import STAGES, TOLERANCE, case, largest_difference
from tests.tiny import FAMILIES

# What cuBLAS asks for under deterministic algorithms, before it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
CASES = [("llama", dtype, stage) for dtype in ("float32", "bfloat16") for stage in STAGES]
CASES += [
    (family, "float32", stage) for family in FAMILIES[1:] for stage in ("edge scores", "patching sweeps", "MANSU")
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("family", "dtype", "stage"), CASES)
def test_a_stage_on_a_gpu_gives_the_cpus_numbers(family: str, dtype: str, stage: str) -> None:
    kind = getattr(torch, dtype)
    found, expected = (STAGES[stage](case(family, device, kind)) for device in ("cuda", "cpu"))
    worst, where = largest_difference(found, expected)
    assert worst <= TOLERANCE[kind], where
    assert {value.device.type for value in found.values()} == {"cpu"}


@pytest.mark.gpu
@needs_gpu
def test_deterministic_algorithms_are_no_error_on_a_gpu_and_give_the_same_bits() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        there = case("llama", "cuda")
        for stage in ("edge scores", "circuits", "MANSU", "relearning, probes, depth, damage"):
            first, second = (STAGES[stage](there) for _ in range(2))
            for key, value in first.items():
                assert torch.equal(value.nan_to_num(), second[key].nan_to_num()), (stage, key)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@needs_gpu
def test_models_and_files_are_the_same_on_either_device(tmp_path) -> None:
    here, there = mtl.load("pocket"), mtl.load("pocket", device="cuda")
    assert fingerprint(here) == fingerprint(there)
    task = mtl.load_task("pocket")
    scores = mtl.edge_attribution(there, task.forget_pairs[:8], steps=1)
    assert scores.model == fingerprint(here) and scores.tensor.device.type == "cpu"
    assert fingerprint(mtl.load(mtl.save(there, tmp_path / "model"))) == fingerprint(here)
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_the_script_sees_what_differs_and_what_raises(capsys) -> None:
    """On a CPU: equal numbers pass, others and errors fail and are named."""
    table, one = gpu_check.Table(), {"scores": torch.ones(3), "free!": torch.ones(1)}

    def broken() -> dict[str, torch.Tensor]:
        raise RuntimeError("expected all tensors\nto be on the same device")

    table.add("m", "equal", lambda: {"scores": torch.ones(3), "free!": torch.zeros(1)}, lambda: one, 1e-3)
    table.add("m", "other", lambda: {"scores": torch.tensor([1.0, 1.0, 1.1])}, lambda: one, 1e-3)
    table.add("m", "shape", lambda: {"scores": torch.ones(2)}, lambda: one, 1e-3)
    table.add("m", "nan", lambda: {"scores": torch.tensor([1.0, 1.0, torch.nan])}, lambda: one, 1e-3)
    table.add("m", "error", broken, lambda: one, 1e-3)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert table.failed == 4
    assert [("FAIL" in line, line.split()[1]) for line in lines] == [
        (False, "equal"), (True, "other"), (True, "shape"), (True, "nan"), (True, "error"),
    ]  # fmt: skip
    assert "scores, allowed 0.001" in lines[1] and "expected all tensors to be on the same device" in lines[4]


def test_the_script_walks_every_family_in_every_dtype_and_asks_for_a_gpu(capsys) -> None:
    jobs = gpu_check.jobs(FAMILIES, every=False)
    assert {(job.family, job.dtype) for job in jobs} >= {(f, d) for f in FAMILIES for d in ("float32", "bfloat16")}
    assert set().union(*(job.stages for job in jobs)) == set(STAGES)
    if not torch.cuda.is_available():
        assert gpu_check.main([]) == 1
        assert "no CUDA device here" in capsys.readouterr().out
    with warnings.catch_warnings():
        numbers = gpu_check.reference(gpu_check.Job("llama", "float32", ("accuracy",)))
    assert largest_difference(numbers["accuracy"], STAGES["accuracy"](case("llama")))[0] == 0
