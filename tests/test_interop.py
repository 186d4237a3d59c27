"""TransformerLens's own attribution_patch and faithfulness, live, against ours after conversion."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformer_lens.tools.analysis.attribution_patching import (
    AttributionResult,
    EdgeAttributionConfig,
    Node,
    attribution_patch,
    faithfulness,
)

import mansu_tl as mtl
from mansu_tl.circuit import (
    Circuit,
    EdgeScores,
    node_scores_from_transformer_lens,
    node_scores_to_transformer_lens,
)
from mansu_tl.errors import MansuError
from tests.test_attribution import random_pairs
from tests.tiny import tiny

FAMILIES = ("gpt2", "gpt_neox")


def theirs(family: str, pairs: mtl.data.PromptPairs, granularity: str) -> AttributionResult:
    """Mean over pairs of their result for each pair; their metric sees the logits of one example only."""
    model = mtl.load(tiny(family))
    model.requires_grad_(True)  # theirs differentiates with respect to them
    nodes: dict[Node, float] = {}
    edges: dict[tuple[Node, Node], float] = {}
    for i in range(len(pairs)):
        good, bad = int(pairs.answers[i]), int(pairs.distractors[i, 0])
        result = attribution_patch(
            model,
            pairs.clean[i : i + 1],
            pairs.corrupt[i : i + 1],
            lambda logits, good=good, bad=bad: logits[0, -1, good] - logits[0, -1, bad],
            EdgeAttributionConfig(granularity=granularity),
        )
        for total, part in ((nodes, result.node_scores), (edges, result.edge_scores)):
            for key, value in part.items():
                total[key] = total.get(key, 0.0) + value / len(pairs)
    return AttributionResult(node_scores=nodes, edge_scores=edges)


@pytest.mark.parametrize("family", FAMILIES)
def test_edge_scores_agree_both_ways(family: str) -> None:
    pairs = random_pairs(n=3)
    model = mtl.load(tiny(family))
    ours = mtl.edge_attribution(model, pairs, method="eap", at="corrupt", per_position=True)
    found = theirs(family, pairs, "edge")
    converted = ours.to_transformer_lens()
    assert converted.edge_scores.keys() == found.edge_scores.keys()
    for edge, score in found.edge_scores.items():
        assert converted.edge_scores[edge] == pytest.approx(score, abs=5e-6)
    assert converted.node_scores.keys() == found.node_scores.keys()
    for node, score in found.node_scores.items():
        assert converted.node_scores[node] == pytest.approx(score, abs=5e-6)
    back = EdgeScores.from_transformer_lens(
        found, model, metric=ours.metric, metric_clean=ours.metric_clean, metric_corrupt=ours.metric_corrupt
    )
    torch.testing.assert_close(back.tensor, ours.tensor, rtol=0, atol=5e-6)
    torch.testing.assert_close(back.per_position, ours.per_position, rtol=0, atol=5e-6)
    assert (back.writers, back.readers, back.method, back.rule) == (ours.writers, ours.readers, "eap", "corrupt")
    assert back.residual == pytest.approx(ours.residual, abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_node_scores_agree(family: str) -> None:
    pairs = random_pairs(n=3)
    model = mtl.load(tiny(family))
    found = theirs(family, pairs, "node")
    ours = mtl.patching.node_attribution(model, pairs, at="corrupt")
    converted = node_scores_from_transformer_lens(found, model, "logit_difference")
    torch.testing.assert_close(converted.tensor, ours.tensor, rtol=0, atol=5e-6)
    assert converted.writers == ours.writers
    by_position = mtl.edge_attribution(model, pairs, method="eap", at="corrupt", per_position=True)
    nodes = by_position.to_transformer_lens().node_scores
    for node, score in found.node_scores.items():
        assert nodes[node] == pytest.approx(score, abs=5e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_node_scores_by_position_become_theirs(family: str) -> None:
    pairs, model = random_pairs(n=3), mtl.load(tiny(family))
    found = theirs(family, pairs, "node")
    ours = mtl.patching.node_attribution(model, pairs, at="corrupt", per_position=True)
    converted = node_scores_to_transformer_lens(ours)
    assert converted.node_scores.keys() == found.node_scores.keys()
    for node, score in found.node_scores.items():
        assert converted.node_scores[node] == pytest.approx(score, abs=5e-6)
    with pytest.raises(MansuError, match="score with per_position=True"):
        node_scores_to_transformer_lens(mtl.patching.node_attribution(model, pairs))
    with pytest.raises(MansuError, match="has no node L0H0.q"):
        node_scores_to_transformer_lens(mtl.patching.node_attribution(model, pairs, qkv=True, per_position=True))


def test_scores_and_circuits_survive_a_round_trip() -> None:
    model, pairs = mtl.load(tiny("gpt2")), random_pairs(n=2)
    scores = mtl.edge_attribution(model, pairs, per_position=True)
    back = EdgeScores.from_transformer_lens(scores.to_transformer_lens(), model)
    torch.testing.assert_close(back.per_position, scores.per_position, rtol=0, atol=0)
    assert back.model == scores.model
    assert back.residual != back.residual  # NaN: the result does not hold the metric
    circuit = Circuit.top(scores, 25)
    again = Circuit.from_transformer_lens(circuit.to_transformer_lens(7), model)
    assert torch.equal(again.mask, circuit.mask)
    top = scores.to_transformer_lens().top_edges(60)
    chosen = Circuit.from_transformer_lens(top, model)
    assert chosen.n_edges > 0
    assert all(score != 0 for score in chosen.scores[chosen.mask].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_their_faithfulness_of_our_circuit_is_ours_on_one_pair(family: str) -> None:
    pairs = random_pairs(n=1)
    model = mtl.load(tiny(family))
    good, bad = int(pairs.answers[0]), int(pairs.distractors[0, 0])
    for n in (5, 30, 60):
        circuit = Circuit.top(mtl.edge_attribution(model, pairs), n)
        result = faithfulness(
            mtl.load(tiny(family)),
            pairs.clean,
            pairs.corrupt,
            lambda logits: logits[0, -1, good] - logits[0, -1, bad],
            circuit.to_transformer_lens(pairs.clean.shape[1]),
        )
        assert result.circuit_size == circuit.n_edges * pairs.clean.shape[1]
        assert result.recovered == pytest.approx(mtl.circuit.faithfulness(model, circuit, pairs), abs=1e-4)


def test_what_cannot_be_converted_is_refused() -> None:
    pairs, grouped, model = random_pairs(n=2), mtl.load(tiny("llama")), mtl.load(tiny("gpt2"))
    with pytest.raises(MansuError, match="4 heads share 2 KV heads"):
        mtl.edge_attribution(grouped, pairs, per_position=True).to_transformer_lens()
    scores = mtl.edge_attribution(model, pairs)
    with pytest.raises(MansuError, match="score with per_position=True"):
        scores.to_transformer_lens()
    by_end = mtl.edge_attribution(model, pairs, per_position="end")
    with pytest.raises(MansuError, match="no positions from the start"):
        by_end.to_transformer_lens()
    with pytest.raises(MansuError, match="n_positions=0"):
        Circuit.top(scores, 5).to_transformer_lens(0)
    with pytest.raises(MansuError, match="no edge scores"):
        EdgeScores.from_transformer_lens(AttributionResult(node_scores={}), model)
    result = mtl.edge_attribution(model, pairs, per_position=True).to_transformer_lens()
    with pytest.raises(MansuError, match=r"L1H0 -> logits: this model has no such edge|no such edge"):
        EdgeScores.from_transformer_lens(result, mtl.load(tiny("gpt2", num_attention_heads=2)))
    deeper = mtl.load(tiny("gpt2", num_hidden_layers=3))
    with pytest.raises(MansuError, match="this model has"):
        EdgeScores.from_transformer_lens(result, deeper)
    with pytest.raises(MansuError, match="no score for"):
        node_scores_from_transformer_lens(replace(result, node_scores={}), model, "m")
    bad = [(Node("mlp_out", 0, layer=1), Node("mlp_in", 0, layer=0))]
    with pytest.raises(MansuError, match="MLP1 -> MLP0.in"):
        Circuit.from_transformer_lens(bad, model)
