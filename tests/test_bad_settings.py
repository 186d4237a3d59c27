"""Bad input whose answer belongs to mansu_tl/unlearning, models/saving.py and quantization/grid.py."""

from __future__ import annotations

import dataclasses
import math
import os

import pytest

import mansu_tl as mtl
from mansu_tl.models import fingerprint
from mansu_tl.quantization.formats.grids import fp4, int4_asymmetric, nf4
from mansu_tl.unlearning import unlearn
from tests.test_bad_input import QUICK, Interrupted, circuit, everything, refused, task  # noqa: F401
from tests.tiny import tiny


@pytest.mark.parametrize("size", [0, -64])
def test_a_block_size_of_nothing(size):
    for make in (nf4, fp4, int4_asymmetric):
        with refused(rf"block_size={size}; give at least 1, or None for whole rows"):
            make(size)


def test_the_null_space_baseline_asks_for_enough_text_too(model, task):  # noqa: F811
    few = dataclasses.replace(task, retain_text=task.retain_text[slice(0, 3)], near_text=task.near_text[slice(0, 3)])
    with refused(r"retain text: \d+ tokens, fewer than the 320 inputs of the widest matrix"):
        unlearn(model, few, "null-space", max_steps=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, 0) for key in ("steps", "forget_batch", "retain_batch", "fisher_sequences", "select_every")],
        ("steps", -1),
        *[(key, math.nan) for key in ("budget", "learning_rate", "retain_budget", "margin", "null_space")],
        ("learning_rate", math.inf),
        ("learning_rate", 0.0),
        ("budget", 2.0),
    ],
)
def test_settings_of_mansu_that_mean_nothing(model, task, circuit, key, value):  # noqa: F811
    with refused(rf"mansu: {key}={value}"):
        unlearn(model, task, circuit=circuit, **{**QUICK, key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("max_steps", 0), ("forget_batch", 0), ("warmup", 0), ("learning_rate", math.nan)]
)
def test_settings_of_the_shared_loop_that_mean_nothing(model, task, key, value):  # noqa: F811
    with refused(rf"training: {key}={value}"):
        unlearn(model, task, "ga", **{key: value})


def test_a_circuit_of_another_model(model, task):  # noqa: F811
    deeper = mtl.load(tiny("llama", vocab_size=500, num_hidden_layers=6))
    theirs = mtl.discover_circuit(deeper, task.forget_pairs, faithfulness=0.01, steps=1)
    with refused(r"circuit: its writers and readers are not this model's; discover one on this model"):
        unlearn(model, task, circuit=theirs, **QUICK)


def test_a_model_folder_survives_an_interrupt_between_the_two_moves(tmp_path, monkeypatch):
    one, two = mtl.load(tiny("llama", seed=1)), mtl.load(tiny("llama", seed=2))
    folder = mtl.save(one, tmp_path / "model")
    before = everything(tmp_path)
    for at in (1, 2):
        with monkeypatch.context() as patched:
            patched.setattr("mansu_tl.models.saving.os.replace", Interrupted(os.replace, at=at))
            with pytest.raises(KeyboardInterrupt):
                mtl.save(two, folder)
        assert everything(tmp_path) == before
    assert fingerprint(mtl.load(mtl.save(two, folder))) == fingerprint(two)
