"""LoRA unlearning: what its adapters can express, what is merged, and what it says to bad settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mansu_tl as mtl
from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights, parameters
from mansu_tl.models.low_rank import low_rank_factors, with_adapters
from mansu_tl.unlearning import Objective, Recipe, StandIns, objectives, unlearn
from mansu_tl.unlearning import checkpoint as checkpoint_module
from mansu_tl.unlearning.objectives import ascent
from tests.test_checkpoint import interrupted_at
from tests.tiny import sliced_task

FEW = {"learning_rate": 1e-3, "max_steps": 6, "check_every": 3, "stop_over_chance": -101.0}


@pytest.fixture(scope="module")
def task():
    return sliced_task(16, retain=48)


def test_factors_of_full_rank_express_any_change_and_begin_at_the_matrix() -> None:
    draw = torch.Generator().manual_seed(0)
    values = {"w": torch.randn(6, 9, generator=draw), "v": torch.randn(3, 2, generator=draw), "other": torch.ones(4)}
    factors = low_rank_factors(values, ["w", "v"], 6, seed=1)
    begun = with_adapters(values, factors, 2.0)
    assert set(begun) == {"w", "v"} and all(begun[name].equal(values[name]) for name in begun)
    wanted = torch.randn(6, 9, generator=draw)
    a, _ = factors["w"]
    b = torch.linalg.lstsq(a.double(), (wanted - values["w"]).double() / 2).solution.float()
    torch.testing.assert_close(with_adapters(values, {"w": (a, b)}, 2.0)["w"], wanted, rtol=0, atol=1e-4)
    again = low_rank_factors(values, ["w", "v"], 6, seed=1)
    assert again["w"][0].equal(a) and not low_rank_factors(values, ["w"], 6, seed=2)["w"][0].equal(a)
    assert low_rank_factors({"w": torch.zeros(20000, 1)}, ["w"], 4, 0)["w"][0].std().item() == pytest.approx(
        0.5, abs=0.01
    )


@pytest.mark.parametrize("rank", [2, 5])
def test_every_matrix_changes_by_its_rank_and_nothing_else_changes(model, task, rank: int) -> None:
    edit = unlearn(model, task, "lora", rank=rank, **FEW)
    before, after = parameters(model), parameters(edit.apply(model))
    assert set(edit.indices) == set(linear_weights(model))
    for name in linear_weights(model):
        values = torch.linalg.svdvals(after[name].double() - before[name].double())
        # The sum in float32 is rounded at every weight: far below what was trained.
        assert values[rank - 1] > 1e-4 and values[rank] < 1e-2 * values[rank - 1], name
    assert edit.facts["rank"] == rank and edit.facts["adapters"] == len(linear_weights(model))


def test_the_first_step_moves_one_factor_by_the_rate(model, task) -> None:
    """Adam's first step is the rate in every weight of B (decay of zeros is nothing), so the change is A times signs."""
    rate, rank, alpha = 1e-2, 3, 6.0
    options = {"learning_rate": rate, "max_steps": 1, "warmup": 1, "stop_over_chance": -101.0, "weight_decay": 0.0}
    edit = unlearn(model, task, "lora", rank=rank, alpha=alpha, matrices="layers.2.mlp.up", seed=4, **options)
    (name,) = edit.indices
    assert name == "model.layers.2.mlp.up_proj.weight"
    change = (parameters(edit.apply(model))[name] - parameters(model)[name]).double()
    a = torch.randn(320, rank, generator=torch.Generator().manual_seed(4)).double() / rank**0.5
    b = torch.linalg.lstsq(a, change).solution / (alpha / rank)
    assert b.abs().max() <= rate * 1.001
    assert (b.abs() > 0.98 * rate).double().mean() > 0.95


def test_parts_of_names_choose_the_matrices(model, task) -> None:
    edit = unlearn(model, task, "lora", matrices="q_proj, v_proj", **FEW)
    assert {name.rsplit(".", 2)[1] for name in edit.indices} == {"q_proj", "v_proj"}


def test_the_objectives_differ_and_a_seed_repeats(model, task) -> None:
    found = [
        unlearn(model, task, "lora", objective=each, seed=1, **FEW) for each in ("npo", "npo-kl", "graddiff", "ga-kl")
    ]
    assert len({edit.digest() for edit in found}) == 4
    assert unlearn(model, task, "lora", seed=1, **FEW).digest() == found[0].digest()
    assert unlearn(model, task, "lora", seed=2, **FEW).digest() != found[0].digest()


def test_an_interrupted_training_of_adapters_goes_on_to_the_same_edit(
    model, task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, file = unlearn(model, task, "lora", seed=3, **FEW), tmp_path / "state.safetensors"
    monkeypatch.setattr(checkpoint_module, "_EVERY", 0.0)
    with monkeypatch.context() as inner:
        interrupted_at(5, objectives, "softplus", inner)
        with pytest.raises(KeyboardInterrupt):
            unlearn(model, task, "lora", seed=3, checkpoint=file, **FEW)
    assert file.is_file()
    with monkeypatch.context() as inner:
        interrupted_at(4, objectives, "softplus", inner)  # two steps are left
        assert unlearn(model, task, "lora", seed=3, checkpoint=file, **FEW).digest() == whole.digest()


def test_it_forgets_on_the_embedded_model(model, task) -> None:
    edit = unlearn(model, task, "lora", learning_rate=3e-3, max_steps=60, seed=0)
    before, after = (mtl.accuracy(each, task.questions["forget"]).mc_percent for each in (model, edit.apply(model)))
    assert before == 100 and after < 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0; choose at least 1"),
        ({"alpha": 0.0}, "alpha=0.0; choose a finite number above 0"),
        ({"objective": "rmu"}, "objective='rmu'; choose one of graddiff, ga-kl, npo, npo-kl"),
        ({"matrices": "fc9"}, r"matrices='fc9' is in no linear layer's name; .* model\.layers\.0\."),
    ],
)
def test_bad_settings_are_named(model, task, settings: dict, message: str) -> None:
    with pytest.raises(MansuError, match=message):
        unlearn(model, task, "lora", **settings)


def test_stand_ins_go_with_no_mask() -> None:
    stand_ins = StandIns({"x": torch.zeros(1)}, lambda original, trained: {})
    with pytest.raises(MansuError, match="instead goes with neither only nor project"):
        Recipe(Objective(ascent), only={"w": torch.ones(1, dtype=torch.bool)}, instead=stand_ins)
    with pytest.raises(MansuError, match="instead goes with neither only nor project"):
        Recipe(Objective(ascent), project=lambda name, change: change, instead=stand_ins)
