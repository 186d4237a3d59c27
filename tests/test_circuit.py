"""Circuits: a circuit known edge by edge, selection, pruning, set algebra, faithfulness, files."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mansu_tl as mtl
from mansu_tl.circuit import Circuit, Graph, patch_edges, random_faithfulness, random_mask
from mansu_tl.circuit.graph import prune
from mansu_tl.errors import MansuError
from tests.test_attribution import random_pairs
from tests.tiny import tiny


@pytest.fixture(scope="module")
def model():
    return mtl.load(tiny("llama"))


@pytest.fixture(scope="module")
def scores(model):
    return mtl.edge_attribution(model, random_pairs())


def one_path_model():
    """A two-layer GPT-2 in which only head L0H1 (at a token) feeds the value of head L1H2, which feeds the logits.

    Every other head and both MLPs write nothing, and the embedding of the changed token is invisible to the logits
    except through that path: the residual stream has separate subspaces for token, first copy and second copy.
    """
    hf = tiny("gpt2", hidden_size=64, n_embd=64, initializer_range=0.0, n_inner=8, num_attention_heads=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        token, first, second = slice(0, 16), slice(16, 32), slice(32, 48)
        table = torch.randn(64, 16, generator=generator)
        hf.transformer.wte.weight[:, token] = table
        hf.transformer.wpe.weight[:, 48:] = 0.1
        for norm in (hf.transformer.h[0].ln_1, hf.transformer.h[1].ln_1, hf.transformer.ln_f):
            norm.weight.fill_(1.0)
        d = 16
        for layer, head, source, target in ((0, 1, token, first), (1, 2, first, second)):
            attention = hf.transformer.h[layer].attn
            value = 2 * 64 + head * d
            attention.c_attn.weight[source, value : value + d] = torch.eye(d)
            attention.c_proj.weight[head * d : (head + 1) * d, target] = 3 * torch.eye(d)
        unembed = torch.randn(64, 16, generator=generator)
        hf.lm_head.weight = torch.nn.Parameter(torch.zeros(64, 64))
        hf.lm_head.weight[:, second] = unembed
        hf.config.tie_word_embeddings = False
    return hf


PATH = {("embed", "L0KV1.v"), ("L0H1", "L1KV2.v"), ("L1H2", "logits")}


def test_a_circuit_known_edge_by_edge_is_recovered() -> None:
    model = mtl.load(one_path_model())
    pairs = random_pairs(n=6, vocab=60)
    graph = Graph.of(model)
    edges = graph.exists.nonzero().tolist()
    masks = torch.ones(len(edges) + 1, *graph.exists.shape)
    for i, (writer, reader) in enumerate(edges):
        masks[i, writer, reader] = 0
    values = patch_edges(model, pairs, masks).double()
    effect = (values[-1] - values[:-1]).abs().mean(1)
    exact = {(graph.writers[w], graph.readers[r]) for (w, r), e in zip(edges, effect.tolist(), strict=True) if e > 1e-6}
    # Norms let every edge into a used reader rescale it a little, so the known path stands out by size.
    largest = effect.topk(3).indices.tolist()
    assert {(graph.writers[edges[i][0]], graph.readers[edges[i][1]]) for i in largest} == PATH
    assert exact >= PATH
    scores = mtl.edge_attribution(model, pairs)
    assert set(Circuit.top(scores, 3).edges) == PATH
    circuit = mtl.discover_circuit(model, pairs, faithfulness=0.85)
    assert set(circuit.edges) >= PATH
    assert circuit.n_edges <= 6


def test_discovered_circuit_is_faithful_on_its_own_measure(model, scores) -> None:
    pairs = random_pairs()
    circuit = mtl.discover_circuit(model, pairs, scores=scores, faithfulness=0.7)
    measured = mtl.faithfulness(model, circuit, pairs)
    assert measured >= 0.7
    assert measured == pytest.approx(circuit.faithfulness, abs=1e-5)
    assert circuit.n_edges < int(scores.exists.sum())


def test_full_circuit_is_faithful_and_the_empty_mask_is_not(model, scores) -> None:
    pairs = random_pairs()
    full = Circuit.top(scores, int(scores.exists.sum()))
    assert mtl.faithfulness(model, full, pairs) == pytest.approx(1.0, abs=1e-4)
    assert len(random_faithfulness(model, full, pairs, seeds=2)) == 2


def test_patching_does_not_depend_on_the_batching(model) -> None:
    pairs = random_pairs(n=5)
    exists = Graph.of(model).exists
    masks = torch.stack([random_mask(exists, 30, seed).float() for seed in range(4)])
    one = patch_edges(model, pairs, masks, batch_size=64)
    two = torch.cat([patch_edges(model, pairs, mask[None], batch_size=2) for mask in masks])
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60))
def test_pruned_edges_are_exactly_those_on_a_path(seed: int, n: int) -> None:
    graph = Graph.from_map(mtl.models.component_map(MODEL))
    mask = random_mask(graph.exists, n, seed)
    kept = prune(mask, graph.writers, graph.readers, 2)
    # Independent: networkx, with a node per writer and per reader.
    flow = nx.DiGraph()
    flow.add_nodes_from(["embed", "logits"])
    for w, r in mask.nonzero().tolist():
        flow.add_edge(graph.writers[w], "in:" + graph.readers[r])
    for reader in graph.readers:
        if reader == "logits":
            flow.add_edge("in:logits", "logits")
            continue
        name, kind = reader.rsplit(".", 1)
        if kind in ("k", "v"):
            layer, kv = name[1:].split("KV")
            targets = [f"L{layer}H{2 * int(kv)}", f"L{layer}H{2 * int(kv) + 1}"]
        else:
            targets = [name]
        for target in targets:
            flow.add_edge("in:" + reader, target)
    below, above = nx.descendants(flow, "embed") | {"embed"}, nx.ancestors(flow, "logits") | {"logits"}
    for w, r in mask.nonzero().tolist():
        on_path = graph.writers[w] in below and "in:" + graph.readers[r] in above
        assert bool(kept[w, r]) == on_path


MODEL = mtl.load(tiny("llama"))


def test_set_algebra_and_views(scores) -> None:
    small, large = Circuit.top(scores, 20), Circuit.top(scores, 40)
    assert set((small & large).edges) <= set(small.edges)
    assert set((small | large).edges) == set(small.edges) | set(large.edges)
    assert not set((large - small).edges) & set(small.edges)
    assert large.jaccard(large) == 1.0
    assert 0 < small.jaccard(large) < 1
    frame = large.to_dataframe()
    assert frame["score"].abs().is_monotonic_decreasing
    assert all(scores[edge] == pytest.approx(s) for edge, s in zip(large.edges, frame["score"], strict=True))
    graph = large.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    assert set(graph.nodes) <= {*scores.writers, "logits"}
    kv = sum(reader.split(".")[0].count("KV") for reader in frame["reader"])
    assert graph.number_of_edges() == len(frame) + kv


def test_a_circuit_survives_a_round_trip_and_a_foreign_file_is_refused(scores, tmp_path: Path) -> None:
    circuit = Circuit.top(scores, 25)
    again = Circuit.load(circuit.save(tmp_path / "c.safetensors"))
    assert torch.equal(again.mask, circuit.mask)
    assert again.edges == circuit.edges
    assert again.how == circuit.how
    scores.save(tmp_path / "s.safetensors")
    with pytest.raises(MansuError, match="holds 'EdgeScores', not a Circuit"):
        Circuit.load(tmp_path / "s.safetensors")


def test_bad_input_is_refused(model, scores) -> None:
    pairs = random_pairs()
    with pytest.raises(MansuError, match="n=0 edges"):
        Circuit.top(scores, 0)
    with pytest.raises(MansuError, match="faithfulness=1.5"):
        mtl.discover_circuit(model, pairs, faithfulness=1.5)
    with pytest.raises(MansuError, match="does not show this knowledge"):
        same = mtl.PromptPairs.from_tokens(pairs.clean, pairs.clean, pairs.answers, pairs.distractors)
        mtl.discover_circuit(model, same)
    with pytest.raises(MansuError, match="not this model's"):
        mtl.faithfulness(mtl.load(tiny("gpt2")), Circuit.top(scores, 10), pairs)
    graph = Graph.of(model)
    with pytest.raises(MansuError, match="no writer 'L9H9'"):
        graph.mask([("L9H9", "logits")])
    with pytest.raises(MansuError, match="computed before the writer"):
        graph.mask([("MLP1", "L0H0.q")])
