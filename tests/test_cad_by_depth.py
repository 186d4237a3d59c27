"""CAD by depth: evidence against finite differences and completeness, and models whose truth is known."""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress

import pandas as pd
import pytest
import torch

import mansu_tl as mtl
from mansu_tl.circuit.attribution import EdgeReader
from mansu_tl.data.forced import forced
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, linear_weights, parameters, rebuild
from mansu_tl.runs import logit_difference
from mansu_tl.runs.metrics import measured
from mansu_tl.runs.passes import run
from mansu_tl.verification import CadByDepth, DepthBounds, DepthReader
from mansu_tl.verification.depth_verdict import depth_verdict
from tests.test_attribution import random_pairs
from tests.tiny import FAMILIES, embedded_task, some, tiny


def known(model, pairs: mtl.data.PromptPairs) -> mtl.data.PromptPairs:
    """The same pairs, clean and corrupt turned round where the model prefers the other answer."""
    told = forced(pairs, 2)
    ends = [
        measured(logit_difference, run(model, tokens, told.places).float(), told)
        for tokens in (told.clean, told.corrupt)
    ]
    turned = (ends[0] < ends[1])[:, None]
    clean, corrupt = torch.where(turned, pairs.corrupt, pairs.clean), torch.where(turned, pairs.clean, pairs.corrupt)
    return mtl.data.PromptPairs.from_tokens(clean, corrupt, pairs.answers, pairs.distractors[:, 0], pairs.lengths)


def difference(model, pairs: mtl.data.PromptPairs) -> torch.Tensor:
    """m(clean) - m(corrupt), pair by pair."""
    told = forced(pairs, 2)
    with torch.no_grad():
        ends = [
            measured(logit_difference, run(model, t, told.places).float(), told) for t in (told.clean, told.corrupt)
        ]
    return ends[0] - ends[1]


def without(model, *names: str):
    """The model with some matrices at zero."""
    return rebuild(model, {name: torch.zeros_like(parameters(model)[name]) for name in names})


@pytest.fixture(scope="module", params=some(FAMILIES, ("llama", "gemma2", "gpt_neox")))
def case(request):
    model = mtl.load(tiny(request.param, num_hidden_layers=3))
    # A random model's slope half-way may have the other sign: the first pairs on which it has the right one.
    for seed in range(20):
        pairs = known(model, random_pairs(n=6, seed=seed))
        with suppress(MansuError):
            return model, pairs, DepthReader(model, pairs, pairs[:3], steps=1)
    raise AssertionError("no pairs")


def test_evidence_at_the_embedding_is_the_whole_difference_and_writers_sum_to_it(case) -> None:
    model, pairs, _ = case
    fine = DepthReader(model, pairs, pairs[:3], steps=40)
    found = fine.read(model)
    torch.testing.assert_close(found.original[0].sum(), difference(model, pairs).sum(), rtol=0.03, atol=1e-4)
    torch.testing.assert_close(found.terms_original.sum(0), found.original[-1], rtol=1e-3, atol=1e-4)
    assert found.writers[:3] == ("embed", "A0", "MLP0") and len(found.writers) == 2 * len(found.layers) - 1


def test_evidence_is_a_slope_of_the_metric_at_the_middle_of_the_way(case) -> None:
    """With one step: moving a stream of the middle run along clean - corrupt, by central differences."""
    model, pairs, reader = case
    told, found, eps = forced(pairs, 2), reader.read(model), 1e-2
    with torch.no_grad():
        clean, corrupt = (reader._passed(model, told, clean=side) for side in (True, False))
        middle = (clean["stream0"] + corrupt["stream0"]) / 2
        for i, key in list(enumerate(reader.streams))[1:]:
            change, ends = clean[key] - corrupt[key], []
            for sign in (1, -1):
                hooks = [
                    (reader.streams["stream0"], lambda x, hook: middle),
                    (reader.streams[key], lambda x, hook, s=sign, d=change: x + s * eps * d),
                ]
                ends.append(measured(logit_difference, run(model, told.clean, told.places, hooks).float(), told))
            slope = (ends[0] - ends[1]) / (2 * eps)
            torch.testing.assert_close(found.original[i], slope, rtol=2e-2, atol=2e-4)


def test_the_original_reads_itself_whole(case) -> None:
    model, pairs, reader = case
    found = reader.read(model, label="itself")
    assert torch.equal(found.original, found.other) and torch.equal(found.near_original, found.near_other)
    assert found.cad.nan_to_num().abs().max() == 0 and found.cad[0] == 0 == found.opposition
    right = mtl.accuracy(model, mtl.data.Questions.of_pairs(pairs)).multiple_choice
    assert all(torch.equal(row, right) for row in found.grafted)


def test_what_is_cut_at_a_layer_shows_from_there_on(case) -> None:
    model, pairs, reader = case
    layer = {name: info for name, info in linear_weights(model).items() if ".1." in name}
    found = reader.read(without(model, *layer))
    assert torch.equal(found.original[:2], found.other[:2])
    assert (found.original[2:] != found.other[2:]).all()
    assert found.layers == ("embed", "L0", "L1", "L2")
    # The original's layers behind the cut see what they always saw; all of them put back from the embedding on too.
    right = mtl.accuracy(model, mtl.data.Questions.of_pairs(pairs)).multiple_choice
    assert torch.equal(found.grafted[0], right) and torch.equal(found.grafted[1], right)
    answered = mtl.accuracy(without(model, *layer), mtl.data.Questions.of_pairs(pairs)).multiple_choice
    assert torch.equal(found.grafted[-1], answered)


@pytest.fixture(scope="module")
def suppressed(model):
    """`pocket` whose last MLP alone was trained against the forget answers: the knowledge below it is untouched."""
    task, last = embedded_task(), f"model.layers.{Anatomy.of(model).n_layers - 1}.mlp.down_proj.weight"
    pairs = task.forget_pairs
    hf = mtl.models.plain(model)
    weight = parameters(model)[last].detach().clone().requires_grad_()
    adam = torch.optim.Adam([weight], lr=3e-3)
    rows = torch.arange(len(pairs))
    for _ in range(60):
        out = torch.func.functional_call(hf, {last: weight}, (pairs.clean,))
        logits = out.logits[rows, pairs.lengths - 1]
        loss = logits.log_softmax(-1)[rows, pairs.answers].clamp_min(-12).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return rebuild(model, {last: weight.detach()})


def test_a_suppressor_leaves_the_knowledge_where_it_was(model, suppressed, tmp_path) -> None:
    task = embedded_task()
    pairs = task.forget_pairs[:48]
    assert mtl.accuracy(suppressed, task.questions["forget"]).mc_percent < 30
    reader = DepthReader(model, pairs, task.retain_pairs[:48])
    found = reader.read(suppressed, label="suppressor")
    assert found.cad[:-1].abs().max() == 0 and found.cad[-1] > 0.9
    assert found.opposition > 0.3 and found.opposition_interval[0] <= found.opposition <= found.opposition_interval[1]
    # Today's CAD cannot tell: it is gone everywhere.
    circuit = mtl.discover_circuit(model, pairs, faithfulness=0.8)
    whole = mtl.circuit_divergence(model, suppressed, circuit, pairs, near=task.retain_pairs[:48])
    assert (
        whole.value > 0.8
        and whole.verdict.name == "suppressed"
        and "that it no longer answers, CAD at L1 is 0.00 to 0.00" in repr(whole)
    )
    assert whole.by_depth.edge_cad < 0.5
    without_near = mtl.circuit_divergence(model, suppressed, circuit, pairs)
    assert without_near.value == whole.value
    with pytest.raises(MansuError, match="near pairs beside circuit_scores"):
        scores = mtl.verification.circuit_scores(model, circuit, pairs)
        mtl.circuit_divergence(scores, suppressed, circuit, pairs, near=task.retain_pairs[:48])
    assert type(whole).load(whole.save(tmp_path / "cad.safetensors")).digest() == whole.digest()
    # Put back on the suppressor's streams, the original's last layer answers.
    assert found.grafted[-2].double().mean() > 0.95 > 0.5 > found.grafted[-1].double().mean()
    table = found.to_dataframe()
    assert list(table.layer) == list(found.layers) and (table.cad_low <= table.cad).all()
    assert "suppressed" in repr(found) and found.verdict().name == "suppressed"
    assert found.facts_gone == 0 and found.answered < 0.4 and math.isnan(found.edge_cad)
    assert reader.read(model).verdict().name == "intact"


def test_it_is_kept_and_read_again(case, tmp_path) -> None:
    model, _, reader = case
    found = reader.read(without(model, next(iter(linear_weights(model)))))
    assert CadByDepth.load(found.save(tmp_path / "cad.safetensors")).digest() == found.digest()


def test_what_cannot_be_read_is_refused(case) -> None:
    model, pairs, reader = case
    turned = mtl.data.PromptPairs.from_tokens(
        pairs.corrupt, pairs.clean, pairs.answers, pairs.distractors[:, 0], pairs.lengths
    )
    with pytest.raises(MansuError, match=r"the original's evidence on the near pairs is -.* nats; use pairs"):
        DepthReader(model, pairs, turned)
    other = mtl.load(tiny("llama", num_hidden_layers=2))
    with pytest.raises(MansuError, match="CAD by depth: the other model has 2 layers"):
        reader.read(other)
    edited = rebuild(model, {})
    edited.add_hook(reader.streams["stream1"], lambda x, hook: 0 * x)
    with pytest.raises(MansuError, match="hook"):
        reader.read(edited)


def test_the_figure_shows_both_sides_and_where_the_fact_is_read(case) -> None:
    model, _, reader = case
    layer = {name: info for name, info in linear_weights(model).items() if ".1." in name}
    found = [reader.read(model, label="itself"), reader.read(without(model, *layer), label="cut <b>")]
    figure = mtl.plots.cad_by_depth(found)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [trace.name for trace in lines] == ["itself", "itself", "cut &lt;b&gt;", "cut &lt;b&gt;"]
    tables = [each.to_dataframe() for each in found]
    for trace, values in zip(lines, [t[c] for t in tables for c in ("cad", "near_cad")], strict=True):
        torch.testing.assert_close(torch.tensor(trace.y).double(), torch.tensor(values.to_numpy()), equal_nan=True)
    uprights = {shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1}
    assert uprights == {reader.read_at + 0.5}
    named = mtl.plots.cad_by_depth({"a": found[0], "b": found[1]}, theme="dark")
    assert {trace.name for trace in named.data if trace.mode == "lines+markers"} == {"a", "b"}
    assert mtl.plots.cad_by_depth(pd.concat(tables)).to_json() == figure.to_json()
    with pytest.raises(MansuError, match="CAD by depth: the table has no column before_reading"):
        mtl.plots.cad_by_depth(tables[0].drop(columns="before_reading"))
    with pytest.raises(MansuError, match="CAD by depth: none given"):
        mtl.plots.cad_by_depth([])
    with pytest.raises(MansuError, match="are not distinct"):
        mtl.plots.cad_by_depth([found[0], found[0]])
    other = dataclasses.replace(found[1], read=found[1].read + 1)
    with pytest.raises(MansuError, match="'cut <b>' was read at other layers"):
        mtl.plots.cad_by_depth([found[0], other])


def test_the_grafting_figure_is_what_the_original_reads_behind_every_layer(case) -> None:
    model, _, reader = case
    cut = [name for name in linear_weights(model) if ".1." in name]
    found = [reader.read(model, label="itself"), reader.read(without(model, *cut), label="cut")]
    figure = mtl.plots.grafting(found, chance=25.0)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [trace.name for trace in lines] == ["itself", "cut"]
    for trace, each in zip(lines, found, strict=True):
        torch.testing.assert_close(torch.tensor(trace.y).double(), 100 * each.grafted.double().mean(1))
    assert {shape.y0 for shape in figure.layout.shapes if shape.y0 == shape.y1} == {25.0}
    assert not [shape for shape in mtl.plots.grafting(found).layout.shapes if shape.y0 == shape.y1]
    other = dataclasses.replace(found[1], read=found[1].read + 1)
    with pytest.raises(MansuError, match="'cut' was read at other layers"):
        mtl.plots.grafting([found[0], other])


def test_edges_of_the_same_model_are_its_edge_scores(case) -> None:
    """And what every writer puts into the logits is its term, whatever model wrote it; both by another way."""
    model, pairs, _ = case
    scores = mtl.edge_attribution(model, pairs, steps=2, per_pair=True)
    reader = EdgeReader(model, pairs, steps=2)
    torch.testing.assert_close(reader.read(model), scores.per_pair, rtol=1e-5, atol=1e-6)
    layer = {name: info for name, info in linear_weights(model).items() if ".1." in name}
    other = rebuild(model, {name: parameters(model)[name] * 0.5 for name in layer})
    found = DepthReader(model, pairs, pairs[:3], steps=2).read(other)
    into = reader.read(other)[..., -1]
    for i, name in enumerate(found.writers):
        at = [
            j for j, w in enumerate(scores.writers) if w == name or (name[0] == "A" and w.startswith(f"L{name[1:]}H"))
        ]
        # A projection's bias has no edge, and neither has a norm behind the heads that looks at all of them at once.
        if name[0] == "A" and Anatomy.of(model).post_norms:
            continue
        torch.testing.assert_close(into[:, at].sum(1), found.terms_other[i], rtol=1e-4, atol=1e-5)


def test_edges_by_hand_and_a_circuits_cad(case) -> None:
    """One edge: the writer's change in the other model against the slope at the reader, by moving the reader's input."""
    model, pairs, _ = case
    layer = {name: info for name, info in linear_weights(model).items() if ".1." in name}
    other = rebuild(model, {name: parameters(model)[name] * 0.5 for name in layer})
    circuit = mtl.circuit.Circuit.top(mtl.edge_attribution(model, pairs, steps=2), 25)
    reader = DepthReader(model, pairs, pairs[:3], circuit=circuit, steps=2)
    found, same = reader.read(other), reader.read(model)
    assert (
        same.edge_cad == 0 == same.edge_interval[0]
        and len(found.edges) == circuit.n_edges == found.edges_other.shape[1]
    )
    every = EdgeReader(model, pairs, steps=2).read(other)
    for i, (writer, target) in enumerate(found.edges[:6]):
        at = circuit.writers.index(writer), circuit.readers.index(target)
        assert torch.equal(found.edges_other[:, i], every[:, at[0], at[1]])
    a, b = found.edges_original.mean(0), found.edges_other.mean(0)
    assert found.edge_cad == pytest.approx(float(1 - (a @ b) / (a @ a)), abs=1e-5)
    low, high = found.edge_interval
    assert low <= found.edge_cad + 1e-6 and found.edge_cad <= high + 1e-6
    # A writer below the cut sends what it always sent.
    below = [i for i, (writer, _) in enumerate(found.edges) if writer == "embed" or writer.startswith(("L0", "MLP0"))]
    torch.testing.assert_close(found.edges_other[:, below], found.edges_original[:, below], rtol=1e-5, atol=1e-7)
    with pytest.raises(MansuError, match="circuit"):
        DepthReader(model, pairs, pairs[:3], circuit=dataclasses.replace(circuit, writers=circuit.writers[::-1]))


@pytest.mark.parametrize(
    ("before", "specificity", "opposition", "answered", "verdict"),
    [
        ((0.7, 1.1), (0.6, 1.0), (0.0, 0.02), 0.1, "erased"),
        ((0.7, 1.1), (0.6, 1.0), (0.2, 0.4), 0.1, "suppressed"),
        ((0.7, 1.1), (-0.1, 0.2), (0.2, 0.4), 0.1, "damaged"),
        ((0.7, 1.1), (0.1, 0.4), (0.0, 0.02), 0.1, "undecided"),
        ((0.7, 1.1), (0.4, 0.58), (0.0, 0.02), 0.1, "undecided"),
        ((0.7, 1.1), (0.6, 1.0), (0.05, 0.2), 0.1, "undecided"),
        ((0.1, 0.3), (0.0, 0.2), (0.0, 0.02), 0.1, "suppressed"),
        ((0.1, 0.3), (0.0, 0.2), (0.0, 0.02), 0.9, "intact"),
        ((0.4, 0.6), (0.0, 0.2), (0.0, 0.02), 0.5, "undecided"),
        ((0.7, 1.1), (0.6, 1.0), (0.0, 0.02), 0.8, "intact"),
    ],
)
def test_verdicts(before, specificity, opposition, answered: float, verdict: str) -> None:
    found = depth_verdict("L22", before, specificity, opposition, answered, DepthBounds())
    assert found.name == verdict
    said = "answers are given" if verdict == "intact" else f"CAD at L22 is {before[0]:.2f} to {before[1]:.2f}"
    assert said in repr(found)


def _drawn(*draws: tuple[str, str, str, int, float]) -> pd.DataFrame:
    rows = [
        {"group": group, "form": form, "method": method, "draw": draw, "layer": layer, "before_reading": i == 0,
         "cad": scale * i}
        for group, form, method, draw, scale in draws
        for i, layer in enumerate(("L0", "L1"))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_figure_over_draws_shows_means_and_their_ends_a_panel_a_group_and_form() -> None:
    table = _drawn(("a", "stored", "one", 0, 0.2), ("a", "stored", "one", 1, 0.8), ("a", "shipped", "one", 0, 0.1),
                   ("b", "stored", "one", 0, 0.3), ("b", "stored", "two", 0, 0.5))  # fmt: skip
    figure = mtl.plots.cad_by_depth_draws(table, title="t")
    lines = [trace for trace in figure.data if trace.customdata is not None]
    assert [[round(y, 6) for y in line.y] for line in lines] == [[0, 0.5], [0, 0.3], [0, 0.5], [0, 0.1]]
    assert [row for line in lines for row in line.customdata][1] == ["L1", 2, 0.2, 0.8]
    assert [line.name for line in lines] == ["one", "one", "two", "one"]
    with pytest.raises(MansuError, match="no column draw"):
        mtl.plots.cad_by_depth_draws(table.drop(columns="draw"))
    with pytest.raises(MansuError, match="no row"):
        mtl.plots.cad_by_depth_draws(table[:0])
    with pytest.raises(MansuError, match="a, draw 1, was read at other layers"):
        mtl.plots.cad_by_depth_draws(table.assign(layer=["L0", "L1", "L0", "L2", *["L0", "L1"] * 3]))
