"""CAD and the scorecard against numbers by hand and models whose answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.errors import MansuError
from mansu_tl.models import parameters, rebuild
from mansu_tl.runs.metrics import logit_difference
from mansu_tl.verification import (
    CircuitScores,
    Divergence,
    Scorecard,
    circuit_divergence,
    circuit_scores,
    measurement,
    output_suppressor,
    scorecard,
)
from tests.tiny import embedded_task, sliced_task
from tests.tiny_study import tiny_case


@pytest.fixture(scope="module")
def task():
    return sliced_task(48, questions=48)


@pytest.fixture(scope="module")
def circuit(model, task) -> Circuit:
    return mtl.discover_circuit(model, task.forget_pairs, faithfulness=0.7, steps=3)


def scores_of(values: list[list[float]]) -> CircuitScores:
    tensor = torch.tensor(values)
    names = tuple(f"MLP{i}" for i in range(tensor.shape[1]))
    return CircuitScores(tensor, names, tuple("logits" for _ in names), torch.arange(tensor.shape[0]))


def test_divergence_by_hand(circuit) -> None:
    pairs = embedded_task().forget_pairs
    a, b = scores_of([[3.0, 4.0], [3.0, 4.0]]), scores_of([[0.0, 2.0], [0.0, 2.0]])
    result = circuit_divergence(a, b, circuit, pairs, label="hand")
    assert result.value == pytest.approx(1 - 8 / 25)
    assert result.mass_loss == pytest.approx(1 - 2 / 7)
    assert result.interval == pytest.approx((1 - 8 / 25, 1 - 8 / 25))  # identical pairs: no spread
    assert circuit_divergence(a, a, circuit, pairs).value == pytest.approx(0)
    gone = scores_of([[0.0, 0.0], [0.0, 0.0]])
    assert circuit_divergence(a, gone, circuit, pairs).value == pytest.approx(1)
    inverted = scores_of([[-3.0, -4.0], [-3.0, -4.0]])
    assert circuit_divergence(a, inverted, circuit, pairs).value == pytest.approx(2)
    with pytest.raises(MansuError, match="all its scores on the original are zero"):
        circuit_divergence(gone, a, circuit, pairs)


def test_the_interval_covers_the_value_and_narrows_with_more_facts(circuit) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = embedded_task().forget_pairs

    def width(n: int) -> float:
        a = torch.randn(n, 5, generator=generator) + 3
        b = 0.3 * a + 0.5 * torch.randn(n, 5, generator=generator)
        result = circuit_divergence(scores_of(a.tolist()), scores_of(b.tolist()), circuit, pairs)
        assert result.interval[0] < result.value < result.interval[1]
        return result.interval[1] - result.interval[0]

    assert width(400) < 0.5 * width(25)


def test_several_wordings_of_a_fact_are_resampled_together(model, task, circuit) -> None:
    scores = circuit_scores(model, circuit, task.forget_pairs, steps=1)
    stems = [label.rsplit(" / ", 1)[0] for label in task.forget_pairs.labels]
    assert len(set(stems)) == 12
    assert int(scores.groups.max()) + 1 == 12
    assert len({(int(g), s) for g, s in zip(scores.groups, stems, strict=True)}) == 12


def test_references_on_the_embedded_models(model, task, circuit) -> None:
    pairs = task.forget_pairs
    before = circuit_scores(model, circuit, pairs, steps=3)
    noise = circuit_divergence(before, mtl.quantize(model, "nf4"), circuit, pairs, steps=3)
    assert abs(noise.value) < 1e-4  # pocket rests on the NF4 grid
    filtered = circuit_scores(model, circuit, pairs, steps=3, metric=output_suppressor(logit_difference, 20.0))
    assert abs(circuit_divergence(before, filtered, circuit, pairs).value) < 1e-4
    never = circuit_divergence(before, mtl.load("pocket-never"), circuit, pairs, steps=3)
    assert never.interval[0] > 0.8


def test_an_unedited_model_fails_where_it_should(model, task, circuit) -> None:
    card = scorecard(model, model, task, circuit, quantizers=["nf4"], title="un-edited")
    assert not card.passed
    failed = {row.property for row in card.rows if not row.passed}
    assert failed == {"forgetting", "structural erasure"}
    frame = card.to_dataframe()
    assert (frame.loc[frame["property"] == "retention", "value"] == 0).all()
    assert card.value("forget MC, %") == 100.0
    assert card.value("CAD by depth, at L1", "nf4") == pytest.approx(0, abs=1e-4)
    verdicts = frame.loc[frame["property"] == "structural erasure", "verdict"]
    assert set(verdicts) == {"fail: intact: 100 % of the answers are given"}
    with pytest.raises(MansuError, match="no row 'luck'"):
        card.value("luck")


def test_nothing_is_judged_where_the_quantizer_alone_breaks_the_model(model, task, circuit) -> None:
    """Neurons scaled up going in and down going out: the same function, but blocks that NF4 cannot hold."""
    live, generator = parameters(model), torch.Generator().manual_seed(0)
    scaled: dict[str, torch.Tensor] = {}
    for name, up in live.items():
        if name.endswith("up_proj.weight"):
            size = 10 ** (6 * torch.rand(len(up), generator=generator) - 3)
            scaled[name] = up * size[:, None]
            below = name.replace("up_proj", "down_proj")
            scaled[below] = live[below] / size
    brittle = rebuild(model, scaled)
    right = [
        mtl.accuracy(each, task.questions["forget"]).mc_percent for each in (brittle, mtl.quantize(brittle, "nf4"))
    ]
    assert right[0] > 95 and right[0] - right[1] > 10
    card = scorecard(brittle, brittle, task, circuit, quantizers=["nf4"], title="brittle")
    row = next(row for row in card.rows if row.measure == "forget MC, %" and row.quantizer == "nf4")
    assert row.verdict == f"not judgeable: nf4 alone lost {right[0] - right[1]:.0f} points"
    assert not row.passed and not card.passed
    # Full precision is judged: the un-edited model knows what it was to forget.
    full = next(row for row in card.rows if row.measure == "forget MC, %" and not row.quantizer)
    assert full.verdict == "fail"
    unjudged = [row for row in card.rows if not row.judgeable]
    assert {row.quantizer for row in unjudged} == {"nf4"}
    assert len(card.failing) == sum(row.verdict.startswith("fail") for row in card.rows)
    assert len(card.failing) + len(unjudged) + sum(row.passed for row in card.rows) == len(card.rows)
    assert f"{len(unjudged)} not judgeable" in repr(card)


def test_a_model_that_never_learnt_passes_forgetting_and_cannot_be_read(model, task, circuit) -> None:
    card = scorecard(model, mtl.load("pocket-never"), task, circuit, quantizers=["nf4"], title="never")
    frame = card.to_dataframe()
    mc = frame[(frame["measure"] == "forget MC, %") & (frame["quantizer"] == "")].iloc[0]
    assert mc["value"] < 50
    assert mc["control"] == 100.0
    assert mc["interval_low"] <= mc["value"] <= mc["interval_high"]
    # It was trained from elsewhere: what near facts it has, the original's gradients do not find.
    structure = frame[frame["property"] == "structural erasure"]
    assert structure["verdict"].str.startswith("not judgeable: near facts are answered as before").all()
    assert not structure["passed"].any()


def test_results_survive_a_round_trip(model, task, circuit, tmp_path: Path) -> None:
    card = scorecard(model, model, task, circuit, title="x")
    assert Scorecard.load(card.save(tmp_path / "card.safetensors")) == card
    cad = circuit_divergence(model, model, circuit, task.forget_pairs, label="same", steps=1)
    again = Divergence.load(cad.save(tmp_path / "cad.safetensors"))
    assert again.value == cad.value
    assert again.interval == cad.interval
    assert again.edges.equals(cad.edges)


def test_a_model_that_rests_on_a_grid_is_measured_once(monkeypatch) -> None:
    """Under that quantizer it is itself; under another it is not, and numbers are those of the twin."""
    model, task = tiny_case()
    resting = mtl.quantize(model, "nf4")
    circuit = mtl.circuit.Circuit.top(mtl.edge_attribution(resting, task.forget_pairs, steps=1), 20)
    asked: list[object] = []

    def counted(one, questions):
        asked.append(one)
        return mtl.accuracy(one, questions)

    monkeypatch.setattr(measurement, "accuracy", counted)
    subject = measurement.Subject(resting, task, circuit, steps=1)
    assert subject.under("nf4") is resting
    assert subject.under("int4-g64") is not resting
    for name in ("", "nf4", "int4-g64"):
        found, twin = subject.answers(name), mtl.quantize(resting, name) if name else resting
        assert all(torch.equal(found[key].log_odds, mtl.accuracy(twin, task.questions[key]).log_odds) for key in found)
        expected = mtl.verification.circuit_scores(twin, circuit, task.forget_pairs, steps=1)
        assert torch.equal(subject.scores(name).tensor, expected.tensor)
    assert len(asked) == 2 * len(task.questions)
    assert subject.divergence(subject, "nf4").value == subject.divergence(subject).value == 0
