"""One more model family is one row: Qwen2, which the package does not know, is loaded, scored, patched, edited and saved."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import mansu_tl as mtl
from mansu_tl.circuit import Graph, patch_edges
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, Family, families, fingerprint, parameters, rebuild, register_family
from mansu_tl.registry import Registry
from tests.test_attribution import random_pairs


@pytest.fixture
def qwen2(monkeypatch: pytest.MonkeyPatch) -> Qwen2ForCausalLM:
    monkeypatch.setattr(families, "_FAMILIES", Registry("family", families._FAMILIES))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=64, num_key_value_heads=2, initializer_range=0.2, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).eval()


def test_a_family_is_refused_until_its_row_is_there(qwen2: Qwen2ForCausalLM) -> None:
    with pytest.raises(MansuError, match="'qwen2' is not supported"):
        mtl.load(qwen2)
    register_family(Family("qwen2", "qwen2", "Qwen2ForCausalLM"))
    anatomy = Anatomy.of(mtl.load(qwen2))
    assert (anatomy.family, anatomy.n_kv_heads, anatomy.post_norms) == ("qwen2", 2, False)
    assert len(anatomy.slices("L1H2.q")) == 2, "Qwen2 has biases on q, k and v"
    assert len(anatomy.slices("L1H2.o")) == 1


def test_its_edge_scores_equal_central_differences_and_it_is_edited_and_saved(
    qwen2: Qwen2ForCausalLM, tmp_path
) -> None:
    register_family(Family("qwen2", "qwen2", "Qwen2ForCausalLM"))
    model, pairs, step = mtl.load(qwen2), random_pairs(), 0.005
    graph = Graph.of(model)
    ours = mtl.edge_attribution(model, pairs, method="eap").tensor[graph.exists]
    edges = graph.exists.nonzero().tolist()
    masks = torch.ones(2 * len(edges), *graph.exists.shape)
    for i, (writer, reader) in enumerate(edges):
        masks[2 * i, writer, reader], masks[2 * i + 1, writer, reader] = 1 + step, 1 - step
    values = patch_edges(model, pairs, masks).double().mean(1)
    difference = (values[0::2] - values[1::2]) / (2 * step)
    large = difference.abs() > 0.02 * difference.abs().max()
    assert ((ours - difference).abs() / difference.abs())[large].max() <= 0.01
    name = "model.layers.0.mlp.down_proj.weight"
    edited = rebuild(model, {name: parameters(model)[name] * 2})
    mtl.save(edited, tmp_path / "edited")
    assert fingerprint(mtl.load(tmp_path / "edited")) == fingerprint(edited) != fingerprint(model)
