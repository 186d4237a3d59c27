"""An interrupted edit goes on to the same result; a training that fell below chance is looked at step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mansu_tl as mtl
from mansu_tl.unlearning import checkpoint as checkpoint_module
from mansu_tl.unlearning import objectives
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.mansu import terms
from tests.tiny import sliced_task

MANSU = {"steps": 16, "learning_rate": 0.5, "fisher_sequences": 4, "retain_batch": 8, "adversary_every": 4,
         "adversary_steps": 2, "null_space": 0.0}  # fmt: skip
CLOSED = {"solver": "closed", "steps": 14, "null_space": 0.1, "fisher": False, "adversary_weight": 0.0}
NPO = {"max_steps": 14, "check_every": 5, "stop_over_chance": -100.0, "learning_rate": 1e-4}


@pytest.fixture(scope="module")
def circuit(model):
    return mtl.discover_circuit(model, sliced_task(32, retain=64).forget_pairs, faithfulness=0.6, steps=2)


def interrupted_at(call: int, module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the n-th call of a function."""
    plain: Callable[..., Any] = getattr(module, name)
    calls: list[int] = []

    def counted(*args: Any, **rest: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return plain(*args, **rest)

    monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize("kind", [pytest.param("mansu", marks=pytest.mark.slow), "closed", "npo"])
def test_an_interrupted_edit_goes_on_to_the_same_edit(
    kind: str, model, circuit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = "npo" if kind == "npo" else "mansu"
    task, options = sliced_task(32, retain=64), {"mansu": MANSU, "closed": CLOSED, "npo": NPO}[kind]
    given = {"circuit": circuit} if method == "mansu" else {}
    # Something that every step calls, and the call in which Ctrl-C comes.
    where, call = {
        "mansu": ((terms, "retain_loss"), 12), "closed": ((terms, "forget_loss"), 10), "npo": ((objectives, "softplus"), 9),
    }[kind]  # fmt: skip
    whole = mtl.unlearn(model, task, method, seed=3, **given, **options)
    file = tmp_path / "state.safetensors"
    monkeypatch.setattr(checkpoint_module, "_EVERY", 0.0)
    with monkeypatch.context() as inner:
        interrupted_at(call, *where, inner)
        with pytest.raises(KeyboardInterrupt):
            mtl.unlearn(model, task, method, seed=3, checkpoint=file, **given, **options)
    assert file.is_file()
    steps: list[int] = []
    read = Checkpoint.read

    def noted(self: Checkpoint) -> Any:
        state = read(self)
        steps.append(-1 if state is None else state[1]["done"])
        return state

    monkeypatch.setattr(Checkpoint, "read", noted)
    # Another seed, or other settings, are another edit.
    with monkeypatch.context() as inner:
        interrupted_at(5, *where, inner)
        with pytest.raises(KeyboardInterrupt):
            mtl.unlearn(model, task, method, seed=4, checkpoint=file, **given, **options)
    with monkeypatch.context() as inner:
        interrupted_at(call, *where, inner)
        with pytest.raises(KeyboardInterrupt):
            mtl.unlearn(model, task, method, seed=3, checkpoint=file, **given, **options)
    again = mtl.unlearn(model, task, method, seed=3, checkpoint=file, **given, **options)
    assert steps[0] == -1 and steps[-1] >= 8
    assert again.digest() == whole.digest()
    assert not file.exists()


def test_a_checkpoint_that_was_cut_short_is_not_used(model, tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    file.write_bytes(b"cut")
    assert Checkpoint(file, "key").read() is None
    whole = mtl.unlearn(model, sliced_task(32, retain=64), "npo", **NPO)
    assert mtl.unlearn(model, sliced_task(32, retain=64), "npo", checkpoint=file, **NPO).digest() == whole.digest()


def test_a_training_that_fell_below_chance_between_two_checks_is_looked_at_step_by_step(model) -> None:
    task = sliced_task(32, retain=64)
    fast = {"learning_rate": 3e-4, "warmup": 1, "max_steps": 40}
    coarse = mtl.unlearn(model, task, "ga", check_every=20, **fast)
    scores = {int(row["step"]): row["forget_mc"] for row in coarse.history}
    last, chance = max(scores), task.forget_pairs.chance
    assert chance == 25.0
    assert 0 < last < 20, "it stopped before the check at which it would have been far below"
    # The first step at which no more than five points above chance are right, as looking at every step finds it.
    every = mtl.unlearn(model, task, "ga", check_every=1, **fast)
    assert every.facts["steps"] == coarse.facts["steps"] == last
    assert coarse.indices.keys() == every.indices.keys()
    assert all(torch.equal(coarse.new[name], every.new[name]) for name in coarse.new)
    assert scores[last] <= chance + 5 < scores[last - 1]


@pytest.mark.parametrize(("options", "percent"), [(1, 50.0), (3, 25.0), (7, 12.5)])
def test_where_a_training_stops_depends_on_how_many_options_there_are(options: int, percent: float) -> None:
    pairs = sliced_task(32, retain=64).forget_pairs
    wrong = pairs.distractors[:, :1].expand(-1, options) + torch.arange(options)
    assert mtl.data.PromptPairs.from_tokens(
        pairs.clean, pairs.corrupt, torch.full_like(pairs.answers, 3), wrong + 4, pairs.lengths
    ).chance == pytest.approx(percent)
