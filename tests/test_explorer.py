"""The explorer's figures: every number they show is computed again another way, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.errors import MansuError
from mansu_tl.explorer import Explorer, ExplorerView, results
from mansu_tl.explorer.explorer import PICTURES
from mansu_tl.explorer.pictures import SELECTED
from mansu_tl.explorer.selection import head_of, parsed_item, part_mask, parts_of
from mansu_tl.models import Anatomy, attention_weights, linear_weights, parameters
from tests.tiny import FAMILIES, tiny, tiny_tokenizer
from tests.tiny_study import crossing_edit, tiny_case

EDGE = ("L0H1", "L1KV1.v")


@pytest.fixture(scope="module")
def case():
    model, task = tiny_case()
    return model, task, crossing_edit(model)


@pytest.fixture
def explorer(case) -> Explorer:
    model, task, edit = case
    return Explorer(
        model, task, {"mansu": edit, "other": crossing_edit(model, 11)}, quantizers=("nf4", "int4-g64"), steps=2
    )


def test_nothing_is_scored_before_it_is_looked_at_and_nothing_twice(explorer, monkeypatch) -> None:
    asked = []
    real = results.edge_attribution
    monkeypatch.setattr(results, "edge_attribution", lambda *a, **k: asked.append(1) or real(*a, **k))
    explorer.figure("faithfulness")
    assert not asked
    explorer.figure("graph")
    assert len(asked) == 3
    explorer.select(pair=3, size=explorer.results.sizes[-1], item="L0H1", alone=True)
    for name in PICTURES:
        explorer.figure(name)
    assert len(asked) == 3
    explorer.select(quantizer="int4-g64")
    explorer.figure("scores")
    assert len(asked) == 4


def test_scores_are_those_of_the_edited_and_quantized_models(case, explorer) -> None:
    model, task, edit = case
    edited = edit.apply(model)
    explorer.select(item="L0H1 → L1KV1.v", pair=4)
    pairs, chosen, means = explorer.figure("scores").data
    for row, each in enumerate((model, edited, mtl.quantize(edited, "nf4"))):
        scores = mtl.edge_attribution(each, task.forget_pairs, steps=2, per_pair=True)
        assert means.x[row] == pytest.approx(scores[EDGE], abs=1e-5)
        value = scores.per_pair[4, scores.writers.index(EDGE[0]), scores.readers.index(EDGE[1])].item()
        assert chosen.x[row] == pytest.approx(value, abs=1e-5)
        assert pairs.x[6 * row + 4] == chosen.x[row]
        explorer_node = explorer.results.scores((("", ""), ("mansu", ""), ("mansu", "nf4"))[row]).mean(0)
        torch.testing.assert_close(explorer_node, scores.tensor, atol=1e-5, rtol=1e-4)
    explorer.select(item="L0H1")
    own = mtl.edge_attribution(model, task.forget_pairs, steps=2)
    assert explorer.figure("scores").data[2].x[0] == pytest.approx(
        own.tensor[own.writers.index("L0H1")].sum().item(), abs=1e-5
    )


def test_cad_of_all_pairs_and_of_one(case, explorer) -> None:
    model, task, edit = case
    twin = mtl.quantize(edit.apply(model), "nf4")
    circuit = explorer.results.circuit(explorer.selection.size)
    for alone, pairs in ((False, task.forget_pairs), (True, task.forget_pairs[[2]])):
        explorer.select(pair=2, alone=alone)
        text = next(a.text for a in explorer.figure("graph").layout.annotations if "nf4" in a.text)
        wanted = mtl.circuit_divergence(model, twin, circuit, pairs, steps=2).value
        assert float(re.search(r"CAD (\S+)", text)[1].replace("−", "-")) == pytest.approx(wanted, abs=0.006)


def test_faithfulness_of_every_size_is_the_circuits(case, explorer) -> None:
    model, task, _ = case
    for size in (explorer.results.sizes[0], explorer.results.sizes[-3]):
        explorer.select(size=size)
        circuit = explorer.results.circuit(size)
        assert explorer.results.faithfulness(size) == pytest.approx(
            mtl.circuit.faithfulness(model, circuit, task.forget_pairs), abs=1e-5
        )
        figure = explorer.figure("faithfulness")
        assert figure.layout.shapes[-1].x0 == size
        assert f"at {size} edges" in figure.layout.title.text


def test_attention_is_the_models(case, explorer) -> None:
    model, task, edit = case
    explorer.select(item="L1H3", pair=5)
    figure = explorer.figure("attention")
    tokens = task.forget_pairs.clean[[5], : int(task.forget_pairs.lengths[5])]
    for panel, each in enumerate((model, edit.apply(model))):
        _, cache = each.run_with_cache(tokens)
        want = cache["blocks.1.attn.hook_pattern"][0, 3].numpy()
        shown = np.array(figure.data[panel].z, dtype=float)
        np.testing.assert_allclose(np.nan_to_num(shown), want, atol=1e-5)


def test_answers_are_the_models(case, explorer) -> None:
    model, task, edit = case
    explorer.select(pair=1)
    table = explorer.answers()
    pairs = task.forget_pairs
    for row, each in enumerate((model, edit.apply(model))):
        logits = each(pairs.clean[[1], : int(pairs.lengths[1])], return_type="logits")[0, -1]
        want = 100 * logits.softmax(-1)[pairs.answers[1]].item()
        assert table["probability of the answer, %"][row] == pytest.approx(want, abs=1e-4)
        assert table["most likely token"][row] == model.tokenizer.decode([int(logits.argmax())])


def test_the_ruler_counts_the_edits_of_the_part(case, explorer) -> None:
    model, _, edit = case
    explorer.select(item="L1H2", part="L1H2.q (q_proj)")
    name = "model.layers.1.self_attn.q_proj.weight"
    d_head = attention_weights(model, 1).q.shape[1]
    changed = (parameters(model)[name] != parameters(edit.apply(model))[name])[2 * d_head : 3 * d_head]
    figure = explorer.figure("weights")
    assert f"{int(changed.sum())} weights edited" in figure.layout.title.text
    assert changed.sum() > 0
    blocks = {int(step.label) for step in figure.layout.sliders[0].steps}
    rows = {i * 64 // 32 for i in range(2 * d_head * 32 // 64, 3 * d_head * 32 // 64)}
    assert blocks <= {r // 2 for r in rows}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_behind_edges_and_nodes_in_every_family(family) -> None:
    model = mtl.load(tiny(family), tokenizer=tiny_tokenizer())
    cmap, linear, attention = Anatomy.of(model), linear_weights(model), attention_weights(model, 1)
    q, o = parts_of("L1H2", cmap, linear)[0], parts_of("L1H2", cmap, linear)[-1]
    for part, want in ((q, attention.q[2]), (o, attention.o[2])):
        stored = parameters(model)[part.piece.parameter]
        shown = stored[part_mask(part, tuple(stored.shape))]
        assert sorted(shown.tolist()) == sorted(want.flatten().tolist())
    reads, writes = parts_of(("MLP0", "L1H2.q"), cmap, linear)
    assert reads == q
    assert writes.name.startswith("MLP0 (")
    assert parts_of("embed", cmap, linear) == ()
    assert len(parts_of(("embed", "logits"), cmap, linear)) == 0
    gated = family not in ("gpt2", "gpt_neox")
    assert len(parts_of(("embed", "MLP1.in"), cmap, linear)) == (2 if gated else 1)
    assert len(parts_of("MLP1", cmap, linear)) == (3 if gated else 2)


def test_an_explorer_of_every_kind_of_matrix(tmp_path) -> None:
    model, task = tiny_case("gpt2")
    explorer = Explorer(model, task, crossing_edit(model), steps=1)
    for item in ("L0H1", "MLP1", ("MLP0", "L1H2.q"), ("embed", "L1KV3.k")):
        explorer.select(item=item)
        for name in ("scores", "weights"):
            assert explorer.figure(name).data
    assert explorer.save_html(tmp_path / "gpt2.html", pairs=[1], sizes=[]).stat().st_size > 4e6


def test_the_head_that_belongs_to_an_item() -> None:
    assert head_of(("MLP0", "L1H2.q"), 2) == "L1H2"
    assert head_of(("MLP0", "L1KV1.k"), 2) == "L1H2"
    assert head_of(("L0H3", "MLP1.in"), 2) == "L0H3"
    assert head_of("L1H0", 2) == "L1H0"
    assert head_of(("embed", "logits"), 2) is head_of("MLP0", 2) is None
    assert parsed_item("a -> b") == parsed_item("a → b") == ("a", "b")


def test_the_chosen_item_is_ringed_in_all_three_panels(explorer) -> None:
    explorer.select(size=explorer.results.sizes[-1])
    for item in (explorer.items()[0], "MLP0"):
        explorer.select(item=item)
        rings = [trace for trace in explorer.figure("graph").data if trace.name == SELECTED]
        assert len(rings) == 3
        assert all(len(ring.x) == 1 for ring in rings)


def test_what_is_not_there_is_refused_and_nothing_changes(case, explorer) -> None:
    model, task, edit = case
    before = explorer.selection
    for choice, words in (
        ({"method": "ga"}, "choose one of mansu, other"),
        ({"quantizer": "int3-g64"}, "choose one of nf4, int4-g64"),
        ({"size": 5000}, "choose one of"),
        ({"pair": 6}, r"choose 0\.\.5"),
        ({"item": "L9H9"}, "no node 'L9H9'"),
        ({"item": ("L1H0", "L0H0.q")}, "backwards"),
        ({"item": "a → b → c"}, "name a node"),
        ({"part": "nothing"}, "see parts"),
        ({"colour": 1}, "nothing is called 'colour'"),
    ):
        with pytest.raises(MansuError, match=words):
            explorer.select(**choice)
        assert explorer.selection == before
    explorer.select(item=("embed", "logits"))
    with pytest.raises(MansuError, match="no attention pattern"):
        explorer.figure("attention")
    with pytest.raises(MansuError, match="no weights that quantization touches"):
        explorer.figure("weights")
    with pytest.raises(MansuError, match="no picture 'pie'"):
        explorer.figure("pie")
    with pytest.raises(MansuError, match="no edit given"):
        Explorer(model, task, {})
    with pytest.raises(MansuError, match="unknown"):
        Explorer(model, task, edit, quantizers=["nf5"])
    other, _ = tiny_case(seed=1)
    with pytest.raises(MansuError, match="another model"):
        Explorer(other, task, edit)


def test_every_size_that_is_offered_can_be_drawn_and_saved(explorer, tmp_path) -> None:
    """Of the strongest edges alone the smallest selections have none on a path: those sizes are not offered."""
    ranking, offered = explorer.results.ranking, explorer.results.sizes
    assert any(Circuit.top(ranking, n).n_edges == 0 for n in range(1, offered[0]))
    for size in offered:
        assert Circuit.top(ranking, size).n_edges > 0
        explorer.select(size=size)
        assert explorer.figure("graph").data
    explorer.select(size=offered[0])
    assert explorer.save_html(tmp_path / "smallest.html", pairs=[0], sizes=[]).stat().st_size > 4e6


def test_a_given_circuit_is_the_first_one_shown(case) -> None:
    model, task, edit = case
    scores = mtl.edge_attribution(model, task.forget_pairs, steps=2)
    for circuit in (Circuit.top(scores, 41, 0.5), Circuit.greedy(scores, 20, 0.5)):
        explorer = Explorer(model, task, edit, scores=scores, circuit=circuit, steps=2)
        assert explorer.results.circuit(explorer.selection.size) is circuit
        assert explorer.results.faithfulness(explorer.selection.size) == 0.5
    with pytest.raises(MansuError, match="no edge to draw"):
        Explorer(model, task, edit, scores=scores, circuit=Circuit.above(scores, 1e9))


def test_what_was_measured_before_is_not_measured_again(case, monkeypatch) -> None:
    model, task, edit = case
    scores = mtl.edge_attribution(model, task.forget_pairs, steps=2)
    circuit = Circuit.top(scores, 41)
    known = mtl.circuit_divergence(model, edit.apply(model), circuit, task.forget_pairs, steps=2)
    explorer = Explorer(model, task, edit, scores=scores, circuit=circuit, steps=2, divergences={("mansu", ""): known})
    monkeypatch.setattr(results, "edge_attribution", lambda *a, **k: pytest.fail("measured again"))
    size = explorer.selection.size
    assert explorer.results.divergence(("mansu", ""), size, None) is known
    assert explorer.results.edge_scores(("", ""), size, None).tolist() == [scores[edge] for edge in circuit.edges]
    found = dict(zip(zip(known.writers, known.readers, strict=True), known.other.tolist(), strict=True))
    assert explorer.results.edge_scores(("mansu", ""), size, None).tolist() == [found[edge] for edge in circuit.edges]


def test_explore_asks_for_what_is_missing(case) -> None:
    model, task, edit = case
    with pytest.raises(MansuError, match=r"explore\(model, task, unlearn"):
        mtl.explore(model)
    shown = mtl.explore(model, task, edit, steps=1)
    assert isinstance(shown, ExplorerView)
    assert list(shown.explorer.results.edits) == [edit.method]
    assert "explore" in mtl.__all__
