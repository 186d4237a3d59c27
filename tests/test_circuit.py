"""Circuits: a circuit known edge by edge, selection, pruning, set algebra, faithfulness, files."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mansu_tl as mtl
from mansu_tl.circuit import (
    Circuit,
    EdgeScores,
    Graph,
    conflict,
    patch_edges,
    random_faithfulness,
    random_mask,
)
from mansu_tl.circuit.intervention import Patching
from mansu_tl.circuit.selection import greedy_mask, top_mask
from mansu_tl.errors import MansuError
from mansu_tl.results.files import read_packed, write_packed
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
    measured = mtl.circuit.faithfulness(model, circuit, pairs)
    assert measured >= 0.7
    assert measured == pytest.approx(circuit.faithfulness, abs=1e-5)
    assert circuit.n_edges < int(scores.exists.sum())


def test_the_search_measures_few_circuits_and_finds_what_measuring_every_size_finds(model, scores, monkeypatch) -> None:
    """Against every size of every grid, on a curve that goes up and down."""
    pairs, total = random_pairs(), int(scores.exists.sum())
    curve = [0.0, *mtl.circuit.faithfulness_curve(model, scores, pairs, [*range(1, total + 1)]).faithfulness.tolist()]
    assert any(b < a - 0.01 for a, b in pairwise(curve))
    measured, values = [], Patching.values
    one_by_one = lambda self, masks: (self.values(mask[None]) for mask in masks)  # noqa: E731 (as with large models)
    monkeypatch.setattr(Patching, "in_turn", one_by_one)
    monkeypatch.setattr(
        Patching, "values", lambda self, masks, *rest: measured.append(len(masks)) or values(self, masks, *rest)
    )
    for target in (0.5, 0.9):
        grid, below, at, tried = sorted({round(total ** (i / 15)) for i in range(16)}), 0, None, 0
        while at is None or at - below > 1:
            tried += len(grid)
            first = next(i for i, n in enumerate(grid) if curve[n] >= target)
            at, below = grid[first], grid[first - 1] if first else below
            grid = sorted({below + max(1, round((at - below) * i / 16)) for i in range(1, 17)})
        measured.clear()
        circuit = mtl.discover_circuit(model, pairs, scores=scores, faithfulness=target)
        assert circuit.edges == Circuit.top(scores, at).edges
        assert circuit.faithfulness == pytest.approx(curve[at], abs=1e-5)
        assert sum(measured) < tried


def test_full_circuit_is_faithful_and_the_empty_mask_is_not(model, scores) -> None:
    pairs = random_pairs()
    full = Circuit.top(scores, int(scores.exists.sum()))
    assert mtl.circuit.faithfulness(model, full, pairs) == pytest.approx(1.0, abs=1e-4)
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
    graph = Graph.of(MODEL)
    mask = random_mask(graph.exists, n, seed)
    kept = graph.pruned(mask)
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


def by_name(scores: EdgeScores, n: int, by: str) -> set[tuple[str, str]]:
    """Greedy growth from the logits, the slow way: rank all open edges anew for every edge taken."""
    groups = 2
    taken: set[tuple[str, str]] = set()
    reached = {"logits"}
    for _ in range(n):
        open_edges = [
            (abs(scores.tensor[w, r].item()) if by == "absolute" else scores.tensor[w, r].item(), -w, -r)
            for w, r in scores.exists.nonzero().tolist()
            if scores.readers[r] in reached and (scores.writers[w], scores.readers[r]) not in taken
        ]
        _, w, r = max(open_edges)
        name = scores.writers[-w]
        taken.add((name, scores.readers[-r]))
        if name.startswith("MLP"):
            reached.add(f"{name}.in")
        elif name != "embed":
            layer, head = name[1:].split("H")
            reached |= {f"{name}.q"} | {f"L{layer}KV{int(head) // groups}.{kind}" for kind in "kv"}
    return taken


@pytest.mark.parametrize("by", ["absolute", "signed"])
def test_greedy_selection_grows_from_the_logits(scores, by: str) -> None:
    for n in (1, 7, 40, 80):
        mask = greedy_mask(scores, n, by)
        names = {(scores.writers[w], scores.readers[r]) for w, r in mask.nonzero().tolist()}
        assert names == by_name(scores, n, by)
        assert Circuit.greedy(scores, n, by=by).n_edges <= n
    total = int(scores.exists.sum())
    assert torch.equal(greedy_mask(scores, total), scores.exists)
    graph = Circuit.greedy(scores, 30).to_networkx()
    assert all(nx.has_path(graph, node, "logits") for node in graph.nodes)


def test_rankings_and_thresholds(scores) -> None:
    signed, absolute = top_mask(scores, 30, "signed"), top_mask(scores, 30)
    assert scores.tensor[signed].min() >= scores.tensor[~signed & scores.exists].max()
    assert scores.tensor[absolute].abs().min() >= scores.tensor[~absolute & scores.exists].abs().max()
    assert "score|" not in Circuit.top(scores, 30, by="signed").how
    level = scores.tensor[absolute].abs().min().item()
    assert torch.equal(Circuit.above(scores, level).mask, Circuit.top(scores, 30).mask)
    above = Circuit.above(scores, 1e-4, by="signed")
    assert (scores.tensor[above.mask] >= 1e-4).all()
    assert Circuit.above(scores, 1e9).n_edges == 0
    with pytest.raises(MansuError, match="unknown ranking by='size'"):
        Circuit.top(scores, 3, by="size")
    with pytest.raises(MansuError, match="threshold=nan"):
        Circuit.above(scores, float("nan"))
    with pytest.raises(MansuError, match="n=0 edges"):
        Circuit.greedy(scores, 0)


def test_a_greedy_circuit_reaches_the_target_too(model, scores) -> None:
    pairs = random_pairs()
    circuit = mtl.discover_circuit(model, pairs, scores=scores, faithfulness=0.7, select="greedy")
    assert mtl.circuit.faithfulness(model, circuit, pairs) == pytest.approx(circuit.faithfulness, abs=1e-5)
    assert circuit.faithfulness >= 0.7 and "grown" in circuit.how
    with pytest.raises(MansuError, match="unknown selection 'all'"):
        mtl.discover_circuit(model, pairs, scores=scores, select="all")


def test_conflict_of_two_circuits(model, scores) -> None:
    other = mtl.edge_attribution(model, random_pairs(seed=5))
    forget, retain = Circuit.top(scores, 30), Circuit.top(other, 30)
    found = conflict(forget, retain)
    assert set(found.edges) == set(forget.edges) & set(retain.edges)
    senders = [{w for w, _ in c.edges} for c in (forget, retain)]
    assert set(found.nodes) == senders[0] & senders[1]
    assert found.jaccard == forget.jaccard(retain)
    assert found.node_jaccard == pytest.approx(len(senders[0] & senders[1]) / len(senders[0] | senders[1]))
    frame = found.to_dataframe()
    for row in frame.itertuples():
        for circuit, score in ((forget, row.forget), (retain, row.retain)):
            i = circuit.writers.index(row.node)
            assert score == pytest.approx(circuit.scores[i][circuit.mask[i]].sum().item(), abs=1e-6)
    assert frame[["forget", "retain"]].abs().min(axis=1).is_monotonic_decreasing
    edges = found.to_dataframe("edges")
    assert len(edges) == len(found.edges)
    assert edges["forget"].tolist() == pytest.approx([scores[w, r] for w, r in edges[["writer", "reader"]].to_numpy()])
    assert "shared edges" in found._repr_html_()
    nothing = conflict(forget, forget - forget)
    assert nothing.edges == () and nothing.jaccard == 0 and len(nothing.to_dataframe("edges")) == 0
    with pytest.raises(MansuError, match="choose nodes or edges"):
        found.to_dataframe("heads")
    with pytest.raises(MansuError, match="different shape"):
        conflict(forget, Circuit.top(mtl.edge_attribution(mtl.load(tiny("gpt2")), random_pairs()), 5))


def without(values: dict, key: str) -> dict:
    return {k: v for k, v in values.items() if k != key}


def test_changed_and_cut_files_are_refused(scores, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    circuit = replace(Circuit.top(scores, 25), faithfulness=float("nan"))
    assert Circuit.load(circuit.save(path)).faithfulness != 0  # NaN = not measured, is fine
    tensors, header = read_packed(path, "Circuit")
    facts = header["fields"]
    backwards, nan = tensors["mask"].clone(), tensors["scores"].clone()
    backwards[-1, 0], nan[0, 0] = True, float("nan")
    for changed, said, message in (
        (tensors | {"mask": backwards}, facts, "MLP1 -> L0H0.q runs backwards"),
        (tensors | {"mask": tensors["mask"][:-1].clone()}, facts, "'scores' is"),
        (tensors | {"mask": tensors["mask"].float()}, facts, "'mask' is"),
        (tensors | {"scores": nan}, facts, "'scores' holds numbers that are not finite"),
        (without(tensors, "scores"), facts, "'scores' is missing"),
        (tensors, without(facts, "how"), "'how' is missing"),
        (tensors, facts | {"colour": "red"}, "'colour' is unknown"),
        (tensors, without(facts, "writers"), "'writers' is missing"),
        (tensors, facts | {"writers": ["embed", "L9H9", *facts["writers"][2:]]}, "'L9H9' is out of place"),
        (tensors, facts | {"readers": facts["readers"][:-1]}, "some are missing"),
        (tensors, facts | {"kv_groups": 4}, "kv_groups=4"),
        (tensors, facts | {"faithfulness": 0.99}, "its numbers are not those that were saved"),
        (tensors, facts | {"faithfulness": "high"}, "'faithfulness' is 'high', not float"),
        (tensors | {"mask": tensors["mask"] & False}, facts, "its numbers are not those that were saved"),
    ):
        write_packed(path, "Circuit", changed, {**header, "fields": said})
        with pytest.raises(MansuError, match=message):
            Circuit.load(path)
    path = replace(
        scores, per_pair=scores.tensor[None].clone(), per_position=scores.tensor[None].clone(), positions=("0",)
    ).save(path)
    tensors, header = read_packed(path, "EdgeScores")
    facts = header["fields"]
    assert EdgeScores.load(path).positions == ("0",)
    phantom = tensors["tensor"].clone()
    phantom[-1, 0] = 1.0
    for changed, said, message in (
        (tensors | {"tensor": phantom}, facts, "edges that no model has"),
        (tensors | {"exists": ~tensors["exists"]}, facts, "edges that no model has"),
        (tensors | {"tensor": tensors["tensor"] / 0}, facts, "'tensor' holds numbers that are not finite"),
        (tensors | {"per_pair": tensors["per_pair"][:, 1:].clone()}, facts, "'per_pair' is"),
        (tensors, facts | {"positions": ["0", "1"]}, "'per_position' has"),
        (without(tensors, "exists"), facts, "'exists' is missing"),
        (tensors, facts | {"writers": facts["writers"][::-1]}, "out of place"),
    ):
        write_packed(path, "EdgeScores", changed, {**header, "fields": said})
        with pytest.raises(MansuError, match=message):
            EdgeScores.load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MansuError, match="cut short"):
        EdgeScores.load(path)


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
        same = mtl.data.PromptPairs.from_tokens(pairs.clean, pairs.clean, pairs.answers, pairs.distractors)
        mtl.discover_circuit(model, same)
    with pytest.raises(MansuError, match="not this model's"):
        mtl.circuit.faithfulness(mtl.load(tiny("gpt2")), Circuit.top(scores, 10), pairs)
    graph = Graph.of(model)
    with pytest.raises(MansuError, match="no writer 'L9H9'"):
        graph.mask([("L9H9", "logits")])
    with pytest.raises(MansuError, match="computed before the writer"):
        graph.mask([("MLP1", "L0H0.q")])


def test_a_circuit_can_be_discovered_by_what_supports_the_answer(model, scores) -> None:
    pairs = random_pairs()
    circuit = mtl.discover_circuit(model, pairs, scores=scores, faithfulness=0.7, by="signed")
    assert mtl.circuit.faithfulness(model, circuit, pairs) >= 0.7
    n = int(circuit.how.split()[1])
    assert torch.equal(circuit.mask, Circuit.top(scores, n, by="signed").mask)
    with pytest.raises(MansuError, match="unknown ranking by='size'"):
        mtl.discover_circuit(model, pairs, scores=scores, by="size")
