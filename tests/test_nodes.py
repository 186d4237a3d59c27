"""Node attribution: queries, keys and values against interventions, the QK fix against brute force, and its point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mansu_tl as mtl
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.patching import NodeScores, node_attribution
from mansu_tl.runs.passes import heads_last, run
from tests.test_attribution import random_pairs
from tests.tiny import FAMILIES, crossed, tiny


def sizes(model) -> dict[str, int]:
    cmap = Anatomy.of(model)
    return {"q": cmap.n_heads, "k": cmap.n_kv_heads, "v": cmap.n_kv_heads}


def nodes_of(model) -> list[tuple[str, str, int, int]]:
    """(name, part, layer, head) of every query, key and value node."""
    out = []
    for layer in range(Anatomy.of(model).n_layers):
        for part, count in sizes(model).items():
            letter = "H" if part == "q" else "KV"
            out += [(f"L{layer}{letter}{head}.{part}", part, layer, head) for head in range(count)]
    return out


def metric_with(model, pairs, base: str, part: str, layer: int, head: int, amount: float, place=slice(None)) -> float:
    """The metric of one end when one head's q, k or v is moved by `amount` of the way to the other end."""
    mine, other = (pairs.clean, pairs.corrupt) if base == "clean" else (pairs.corrupt, pairs.clean)
    name = f"blocks.{layer}.attn.{part}.hook_out"
    with torch.no_grad():
        _, a = model.run_with_cache(mine)
        _, b = model.run_with_cache(other)

        def move(value, hook):
            new = value.clone().reshape(*value.shape[:2], sizes(model)[part], -1)
            change = heads_last(b[name] - a[name], sizes(model)[part])
            new[:, place, head] += amount * change[:, place, head]
            return new.reshape(value.shape)

        logits = run(model, mine, pairs.lengths, [(name, move)]).double()
    return mtl.runs.logit_difference(logits, pairs).mean().item()


@pytest.mark.parametrize(("family", "at"), crossed(FAMILIES, ["clean", "corrupt"]))
def test_queries_keys_and_values_equal_the_slope_of_patching_them(family: str, at: str) -> None:
    model, pairs, step = mtl.load(tiny(family)), random_pairs(n=2, padded=True), 0.01
    scores = node_attribution(model, pairs, at=at, qkv=True)
    sign = -1 if at == "clean" else 1
    found, expected = [], []
    for name, part, layer, head in nodes_of(model)[::2]:
        up, down = (metric_with(model, pairs, at, part, layer, head, s * step) for s in (1, -1))
        found.append(scores[name])
        expected.append(sign * (up - down) / (2 * step))
    a, b = torch.tensor(found), torch.tensor(expected)
    assert (a - b).abs().max() <= 0.01 * b.abs().max()
    assert b.abs().max() > 0.01


def brute_force(model, pairs, at: str, part: str, layer: int, head: int, place=slice(None)) -> float:
    """(pattern with one head's q or k patched - pattern) . gradient at the pattern, with one run for one node."""
    mine, other = (pairs.clean, pairs.corrupt) if at == "clean" else (pairs.corrupt, pairs.clean)
    hook_name, pattern_name = f"blocks.{layer}.attn.{part}.hook_out", f"blocks.{layer}.attn.hook_pattern"
    kept: dict[str, torch.Tensor] = {}

    def hold(key: str):
        def hook_fn(value, hook):
            kept[key] = value
            return value

        return hook_fn

    with torch.no_grad():
        _, cache = model.run_with_cache(other)

    def patch(value, hook):
        new = value.clone().reshape(*value.shape[:2], sizes(model)[part], -1)
        new[:, place, head] = heads_last(cache[hook_name], sizes(model)[part])[:, place, head]
        return new.reshape(value.shape)

    def begin(value, hook):
        return value.detach().requires_grad_()

    with torch.enable_grad():
        logits = run(model, mine, pairs.lengths, [("blocks.0.hook_in", begin), (pattern_name, hold("base"))])
        value = mtl.runs.logit_difference(logits, pairs).sum()
        gradient = torch.autograd.grad(value, kept["base"])[0]
    with torch.no_grad():
        run(model, mine, pairs.lengths, [(hook_name, patch), (pattern_name, hold("patched"))])
    change = kept["patched"] - kept["base"].detach()
    return (change * gradient).sum().item() / len(pairs) * (-1 if at == "clean" else 1)


@pytest.mark.parametrize(("family", "at"), crossed(FAMILIES, ["clean", "corrupt"]))
def test_the_qk_fix_equals_brute_force(family: str, at: str) -> None:
    model, pairs = mtl.load(tiny(family)), random_pairs(n=2, padded=True)
    plain = node_attribution(model, pairs, at=at, qkv=True)
    fixed = node_attribution(model, pairs, at=at, qk_fix=True, per_position=True)
    changed = 0
    for name, part, layer, head in nodes_of(model):
        if part == "v":
            assert fixed[name] == pytest.approx(plain[name], abs=1e-6)
            continue
        assert fixed[name] == pytest.approx(brute_force(model, pairs, at, part, layer, head), abs=5e-6)
        changed += abs(fixed[name] - plain[name]) > 1e-4
        if head == 0:
            column = fixed.writers.index(name)
            for place in (1, 3):
                expected = brute_force(model, pairs, at, part, layer, head, slice(place, place + 1))
                assert fixed.per_position[place, column].item() == pytest.approx(expected, abs=5e-6)
    assert changed > 3


def test_the_qk_fix_sees_through_a_saturated_softmax() -> None:
    hf = tiny("llama", num_hidden_layers=1)
    with torch.no_grad():
        hf.model.layers[0].self_attn.q_proj.weight.mul_(12)
        # Little but the softmax is nonlinear: no MLP, and heads that hardly move the final norm's scale.
        hf.model.layers[0].mlp.down_proj.weight.zero_()
        hf.model.layers[0].self_attn.o_proj.weight.mul_(0.01)
    model, pairs = mtl.load(hf), random_pairs(n=6, width=9)
    # The last token reads, so its query is what differs.
    pairs.corrupt[:, -1] = (pairs.clean[:, -1] + 7) % 40
    plain, fixed = node_attribution(model, pairs, qkv=True), node_attribution(model, pairs, qk_fix=True)
    clean = metric_with(model, pairs, "clean", "q", 0, 0, 0.0)
    exact, off_plain, off_fixed = [], [], []
    for name, part, layer, head in nodes_of(model):
        if part == "q":
            exact.append(clean - metric_with(model, pairs, "clean", part, layer, head, 1.0))
            off_plain.append(abs(plain[name] - exact[-1]))
            off_fixed.append(abs(fixed[name] - exact[-1]))
    assert max(map(abs, exact)) > 0.005
    assert sum(off_fixed) < 0.1 * sum(off_plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_details_of_nodes_add_up(family: str) -> None:
    model, pairs = mtl.load(tiny(family)), random_pairs(n=5, padded=True)
    scores = node_attribution(model, pairs, qkv=True, per_pair=True, per_position="end", batch_size=2)
    whole = node_attribution(model, pairs, qkv=True)
    torch.testing.assert_close(scores.tensor, whole.tensor, rtol=0, atol=2e-6)
    torch.testing.assert_close(scores.per_pair.mean(0), whole.tensor, rtol=0, atol=2e-6)
    torch.testing.assert_close(scores.per_position.sum(0), whole.tensor, rtol=0, atol=2e-6)
    assert scores.positions[-1] == "-1"


def test_gradients_along_the_path_give_the_rows_of_eap_ig() -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    nodes = node_attribution(model, pairs, steps=5)
    edges = mtl.edge_attribution(model, pairs, steps=5)
    torch.testing.assert_close(nodes.tensor, edges.node_scores(), rtol=0, atol=5e-6)
    assert nodes.at == "path"


def test_node_scores_survive_a_round_trip(tmp_path: Path) -> None:
    scores = node_attribution(mtl.load(tiny("gpt2")), random_pairs(), qk_fix=True, per_position=True)
    again = NodeScores.load(scores.save(tmp_path / "nodes.safetensors"))
    assert torch.equal(again.tensor, scores.tensor)
    assert torch.equal(again.per_position, scores.per_position)
    assert again.writers == scores.writers
    assert again.qk_fix
    assert "QK fix" in repr(again)
    assert "L0H0.q" in scores.to_dataframe()["writer"].tolist()


def test_bad_input_is_refused() -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    with pytest.raises(MansuError, match="unknown end 'middle'"):
        node_attribution(model, pairs, at="middle")
    with pytest.raises(MansuError, match="steps=0"):
        node_attribution(model, pairs, steps=0)
    with pytest.raises(MansuError, match="the QK fix is defined at one end"):
        node_attribution(model, pairs, steps=3, qk_fix=True)
    with pytest.raises(MansuError, match="node 'L9H9': not in these scores"):
        node_attribution(model, pairs)["L9H9"]
