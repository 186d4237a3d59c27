"""Relearning by adapters against PyTorch's own parametrization, and budgets against curves made up by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize

import mansu_tl as mtl
from mansu_tl import plots
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint, linear_weights
from mansu_tl.runs.metrics import accuracy
from mansu_tl.verification import (
    Budget,
    BudgetPlan,
    RelearningBudgets,
    RelearningCurve,
    near_attack,
    relearn,
    relearning_budgets,
)
from tests.test_erasure import tiny_attack
from tests.tiny import FAMILIES, some, tiny, tiny_tokenizer

FACTS = ("a", "a", "b", "c")


class Adapter(torch.nn.Module):
    """W + 16 / rank A B, as PyTorch would have it parametrized."""

    def __init__(self, shape: torch.Size, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(shape[0], rank, generator=generator) / rank**0.5)
        self.b = torch.nn.Parameter(torch.zeros(rank, shape[1]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 16 / self.a.shape[1] * self.a @ self.b


@pytest.mark.parametrize("family", some(FAMILIES, ("llama", "gpt2")))
def test_adapters_are_what_a_parametrization_trains(family: str) -> None:
    attack, rank = tiny_attack(), 3
    hf, model = tiny(family), tiny(family)
    before = fingerprint(hf)
    options = {"steps": 3, "learning_rate": 1e-2, "batch_size": 12, "ask_at": range(4), "seed": 5}
    curve = relearn(hf, attack, rank=rank, **options)
    assert fingerprint(hf) == before
    generator = torch.Generator().manual_seed(5)
    model.requires_grad_(False)
    adapters = []
    for name in linear_weights(model):
        module = model.get_submodule(name.removesuffix(".weight"))
        adapters.append(Adapter(module.weight.shape, rank, generator))
        parametrize.register_parametrization(module, "weight", adapters[-1])
    moving = [p for adapter in adapters for p in adapter.parameters()]
    optimizer = torch.optim.AdamW(moving, lr=1e-2, weight_decay=0.01)
    text = attack.text
    last = torch.arange(text.tokens.shape[1])[None] == text.lengths[:, None] - 1
    for step in range(4):
        loss = model(text.tokens, labels=torch.where(last, text.tokens, -100)).loss
        assert curve.loss[step].item() == pytest.approx(loss.item(), rel=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert curve.loss[3] < curve.loss[0]
    assert torch.allclose(curve.values[2, 0], accuracy(hf, attack.questions).log_odds, atol=1e-5)
    assert (curve.attack, relearn(hf, attack, **options).attack) == ("hand, LoRA 3", "hand")
    assert curve.digest() == relearn(hf, attack, rank=rank, **options).digest()
    with pytest.raises(MansuError, match="rank=-1; choose 1 or more"):
        relearn(hf, attack, rank=-1)


def test_near_facts_can_be_trained_on(task) -> None:
    attack = near_attack(task)
    assert attack.text.tokens.equal(task.near_text.tokens) and attack.kind == "text"
    assert attack.questions.facts == task.questions["forget"].facts
    assert attack.trained.equal(task.near_text.lengths - 1)
    with pytest.raises(MansuError, match="no near text"):
        near_attack(dataclasses.replace(task, near_text=task.near_text[:0]))


def curve_of(
    label: str, hits: dict[int, float], rate: float, attack: str = "s0", prior: float = 0.1
) -> RelearningCurve:
    """Right so often at each step, the same at every question."""
    values = torch.tensor([[[level] * len(FACTS) for level in hits.values()]] * 3)
    return RelearningCurve(
        label,
        attack,
        "facts",
        rate,
        0,
        tuple(hits),
        values,
        torch.full_like(values, prior),
        torch.zeros(len(hits)),
        FACTS,
    )


def made_up() -> RelearningBudgets:
    """The edited model is won best by a large rate at once and by a small one in the end; the other one never by much."""
    hits = {
        ("edited", 1e-3): {0: 0.2, 10: 0.6, 50: 0.4}, ("edited", 1e-4): {0: 0.2, 10: 0.3, 50: 0.9},
        ("never", 1e-3): {0: 0.1, 10: 0.2, 50: 0.3}, ("never", 1e-4): {0: 0.1, 10: 0.1, 50: 0.2},
    }  # fmt: skip
    budgets = tuple(Budget("forget facts", 4, rate, 0) for _, rate in hits)
    curves = tuple(curve_of(label, steps, rate) for (label, rate), steps in hits.items())
    return RelearningBudgets(budgets, curves, "never")


def test_the_strongest_attack_of_a_budget_by_hand(tmp_path: Path) -> None:
    found = made_up()
    table = found.strongest().set_index(["label", "step"])
    wanted = {0: (20, 1e-3, 0), 10: (60, 1e-3, 10), 50: (90, 1e-4, 50)}
    for step, (value, rate, at) in wanted.items():
        row = table.loc[("edited", step)]
        assert (round(row["value"]), row["learning_rate"], row["at_step"]) == (value, rate, at)
        assert row["excess"] == pytest.approx(value - 10, abs=1e-4)
        other = {0: 0, 10: 10, 50: 20}[step]  # the never-trained model's own best, above its prior
        assert row["over_reference"] == pytest.approx(value - 10 - other, abs=1e-4)
        assert table.loc[("never", step)]["over_reference"] == pytest.approx(0, abs=1e-4)
    every = found.to_dataframe().set_index(["label", "learning_rate", "step"])
    assert every.loc[("edited", 1e-4, 10)]["over_reference"] == pytest.approx(20 - 0, abs=1e-4)
    assert RelearningBudgets.load(found.save(tmp_path / "a.safetensors")).digest() == found.digest()
    assert "never" in repr(found) and "4 curves" in repr(found)
    # Two splits of one attack are one row, their questions taken together.
    second = tuple(dataclasses.replace(c, attack="s1", values=torch.zeros_like(c.values)) for c in found.curves)
    both = RelearningBudgets(found.budgets * 2, found.curves + second, "never")
    assert len(both.strongest()) == 6
    assert both.strongest().set_index(["label", "step"]).loc[("edited", 50)]["value"] == pytest.approx(45, abs=1e-4)
    # Without names that stand for nothing there is no prior, and the values decide.
    blind = tuple(dataclasses.replace(c, prior=torch.full_like(c.prior, torch.nan)) for c in found.curves)
    row = RelearningBudgets(found.budgets, blind).strongest().set_index(["label", "step"]).loc[("edited", 50)]
    assert (row["at_step"], row["value"]) == (50, pytest.approx(90, abs=1e-4))


def test_budgets_refuse_what_does_not_fit_together() -> None:
    found = made_up()
    with pytest.raises(MansuError, match="4 curves for 3 budgets"):
        RelearningBudgets(found.budgets[:3], found.curves)
    with pytest.raises(MansuError, match="reference 'x' is none of edited, never"):
        RelearningBudgets(found.budgets, found.curves, "x")
    with pytest.raises(MansuError, match="asked at different steps"):
        RelearningBudgets(found.budgets, (*found.curves[:3], curve_of("never", {0: 0.1}, 1e-4)))
    with pytest.raises(MansuError, match=r"'never' has not undergone Budget"):
        RelearningBudgets(found.budgets[:3], found.curves[:3], "never").to_dataframe()
    for wrong, said in (
        ({"texts": ("luck",)}, "no text 'luck'"), ({"facts": (), "texts": ()}, "nothing to run"),
        ({"ranks": ()}, "nothing to run"), ({"steps": (0,)}, r"steps=\(0,\)"), ({"ranks": (-1,)}, r"ranks=\(-1,\)"),
    ):  # fmt: skip
        with pytest.raises(MansuError, match=said):
            BudgetPlan(**wrong)


def test_a_plan_is_run_curve_by_curve_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    from tests.road import tiny_task

    task, model = tiny_task(), mtl.load(tiny("llama"), tokenizer=tiny_tokenizer())
    models = {"edited": model, "never, 2/3": mtl.load(tiny("llama", seed=1), tokenizer=tiny_tokenizer())}
    plan = BudgetPlan((1,), ("near facts",), learning_rates=(1e-3,), steps=(1, 2), ranks=(0, 2))
    folder, count, real = tmp_path / "curves", [], relearn

    def counted(*args, **kwargs):
        if len(count) == 3:
            raise KeyboardInterrupt
        count.append(kwargs["label"])
        return real(*args, **kwargs)

    monkeypatch.setattr("mansu_tl.verification.budgets.relearn", counted)
    with pytest.raises(KeyboardInterrupt):
        relearning_budgets(models, task, plan, reference="never, 2/3", folder=folder)
    monkeypatch.setattr("mansu_tl.verification.budgets.relearn", real)
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(made) == 3
    found = relearning_budgets(models, task, plan, reference="never, 2/3", folder=folder)
    assert {path: path.stat().st_mtime_ns for path in made} == made  # nothing twice
    assert len(found.curves) == 2 * 2 * 2 and found.steps == (0, 1, 2)
    assert {budget.kind for budget in found.budgets} == {
        (text, facts, rank) for text, facts in (("forget facts", 1), ("near facts", 0)) for rank in (0, 2)
    }
    # A budget of one step of a longer run is a run of one step.
    short = relearn(model, next(plan.attacks(task))[2], steps=1, learning_rate=1e-3, ask_at=(0, 1))
    assert short.values.equal(found.curves[0].values[:, :2])
    # Another model of the same name is measured anew.
    swapped = {"edited": models["never, 2/3"]}
    changed = relearning_budgets(swapped, task, dataclasses.replace(plan, texts=(), ranks=(0,)), folder=folder)
    assert not changed.curves[0].values.equal(found.curves[0].values)
    for wrong, said in (({}, "no model"), ({"edited": model}, "reference 'x' is none of edited")):
        with pytest.raises(MansuError, match=said):
            relearning_budgets(wrong, task, plan, reference="x" if wrong else None)


def test_the_figure_draws_the_strongest_attack_and_the_reference_in_grey() -> None:
    found = made_up()
    figure = plots.relearning_budgets(found)
    lines = [trace for trace in figure.data if trace.name == "edited" and trace.mode == "lines+markers"]
    assert len(lines) == 1 and list(lines[0].y) == pytest.approx([10, 50, 80], abs=1e-3)
    assert list(plots.relearning_budgets(found, excess=False).data[1].y) == pytest.approx([20, 60, 90], abs=1e-3)
    reference = next(trace for trace in figure.data if trace.name == "never" and trace.mode == "lines+markers")
    assert reference.line.dash == "dot"
    assert "4 forget facts, all parameters" in figure.layout.annotations[0].text
    second = tuple(dataclasses.replace(budget, rank=8) for budget in found.budgets)
    both = RelearningBudgets(found.budgets + second, found.curves * 2, "never")
    titles = [note.text for note in plots.relearning_budgets(both, theme="dark").layout.annotations]
    assert any("LoRA 8" in text for text in titles)
    with pytest.raises(MansuError, match="no measure 'luck'"):
        plots.relearning_budgets(found, measure="luck")
