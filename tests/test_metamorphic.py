"""Facts that hold for every model and every set of pairs, on random families, shapes and prompts."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

import mansu_tl as mtl
from mansu_tl.models import Anatomy
from mansu_tl.runs.metrics import logit_difference
from tests.test_attribution import random_pairs, swapped
from tests.tiny import FAMILIES, tiny

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True)


@functools.cache
def shaped(family: str, layers: int, heads: int, groups: int, seed: int) -> PreTrainedModel:
    sizes: dict[str, object] = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": 8 * heads}
    if family not in ("gpt2", "gpt_neox"):
        sizes["num_key_value_heads"] = heads // groups if heads % groups == 0 else heads
    return tiny(family, seed=seed, **sizes)


# Shapes are drawn and built in the test: building draws random numbers of its own.
models = st.tuples(
    st.sampled_from(FAMILIES),
    st.integers(1, 3),
    st.sampled_from([2, 4, 6]),
    st.sampled_from([1, 2, 6]),
    st.integers(0, 1),
)
pairs_of = st.tuples(st.integers(1, 4), st.integers(5, 9), st.integers(0, 10_000), st.booleans())


def hooked(shape: tuple[str, int, int, int, int]) -> TransformerBridge:
    return mtl.load(shaped(*shape))


def drawn(numbers: tuple[int, int, int, bool]) -> mtl.data.PromptPairs:
    n, width, seed, padded = numbers
    return random_pairs(n=n, width=width, seed=seed, padded=padded)


def close(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Equal up to 5e-6 of the largest score, or of 1 where scores are smaller."""
    size = (a if scale is None else scale).abs().max().clamp(min=1)
    torch.testing.assert_close(a / size, b / size, rtol=0, atol=5e-6)


@SETTINGS
@given(shape=models, numbers=pairs_of, at=st.sampled_from(["clean", "corrupt"]))
def test_a_node_is_the_sum_of_its_edges(shape: tuple, numbers: tuple, at: str) -> None:
    model, pairs = hooked(shape), drawn(numbers)
    edges = mtl.edge_attribution(model, pairs, method="eap", at=at)
    nodes = mtl.patching.node_attribution(model, pairs, at=at)
    kept = torch.ones(len(edges.writers), dtype=torch.bool)
    if Anatomy.of(model).post_norms:  # a head's gradient is taken in front of the post-norm, an edge's behind it
        kept = torch.tensor(["H" not in name for name in edges.writers])
    close(edges.node_scores()[kept], nodes.tensor[kept], edges.tensor)


@SETTINGS
@given(shape=models, numbers=pairs_of, steps=st.integers(1, 4), size=st.integers(1, 4))
def test_positions_and_pairs_add_up_and_batching_is_invisible(
    shape: tuple, numbers: tuple, steps: int, size: int
) -> None:
    model, pairs = hooked(shape), drawn(numbers)
    whole = mtl.edge_attribution(model, pairs, steps=steps)
    for align in ("start", "end"):
        detail = mtl.edge_attribution(model, pairs, steps=steps, per_pair=True, per_position=align, batch_size=size)
        close(detail.tensor, whole.tensor)
        close(detail.per_pair.mean(0), whole.tensor)
        close(detail.per_position.sum(0), whole.tensor)


@SETTINGS
@given(shape=models, numbers=pairs_of)
def test_swapping_the_prompts_turns_the_sign(shape: tuple, numbers: tuple) -> None:
    model, pairs = hooked(shape), drawn(numbers)
    one = mtl.edge_attribution(model, pairs, method="eap", at="clean")
    other = mtl.edge_attribution(model, swapped(pairs), method="eap", at="corrupt")
    close(one.tensor, -other.tensor)
    close(mtl.edge_attribution(model, pairs).tensor, -mtl.edge_attribution(model, swapped(pairs)).tensor)


@SETTINGS
@given(shape=models, numbers=pairs_of, factor=st.sampled_from([-3.0, 0.25, 7.0]))
def test_scores_are_linear_in_the_metric(shape: tuple, numbers: tuple, factor: float) -> None:
    model, pairs = hooked(shape), drawn(numbers)

    def scaled(logits: torch.Tensor, pairs: mtl.data.PromptPairs) -> torch.Tensor:
        return factor * logit_difference(logits, pairs)

    a, b = mtl.edge_attribution(model, pairs, metric=scaled), mtl.edge_attribution(model, pairs)
    close(a.tensor, factor * b.tensor)


@SETTINGS
@given(shape=models, numbers=pairs_of, extra=st.integers(1, 4))
def test_padding_is_invisible(shape: tuple, numbers: tuple, extra: int) -> None:
    model, pairs = hooked(shape), drawn(numbers)
    more = torch.randint(5, 40, (len(pairs), extra), generator=torch.Generator().manual_seed(0))
    padded = mtl.data.PromptPairs.from_tokens(
        torch.cat([pairs.clean, more], 1),
        torch.cat([pairs.corrupt, more.flip(1)], 1),
        pairs.answers,
        pairs.distractors,
        pairs.lengths,
    )
    close(mtl.edge_attribution(model, padded).tensor, mtl.edge_attribution(model, pairs).tensor)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True)
@given(shape=models, numbers=pairs_of)
def test_eap_ig_is_complete_in_the_limit(shape: tuple, numbers: tuple) -> None:
    model, pairs = hooked(shape), drawn(numbers)
    scores = mtl.edge_attribution(model, pairs, steps=128)
    # The path can be much longer than the distance between its ends, so the change is measured along it.
    along = scores.tensor[0].abs().sum().clamp(min=0.1).item()
    assert scores.residual <= 0.01 * along


@SETTINGS
@given(
    family=st.sampled_from(["llama", "mistral", "qwen3", "gemma2", "gemma3"]),
    heads=st.sampled_from([2, 4, 6]),
    kv=st.sampled_from([1, 2]),
    numbers=pairs_of,
)
def test_a_kv_head_is_the_sum_of_its_group(family: str, heads: int, kv: int, numbers: tuple) -> None:
    pairs, sizes = drawn(numbers), {"num_attention_heads": heads, "hidden_size": 8 * heads}
    grouped = tiny(family, num_key_value_heads=kv, **sizes)
    repeated = tiny(family, num_key_value_heads=heads, **sizes)
    state = grouped.state_dict()
    for name, value in list(state.items()):
        if "k_proj" in name or "v_proj" in name:
            state[name] = value.unflatten(0, (kv, -1)).repeat_interleave(heads // kv, 0).flatten(0, 1)
    repeated.load_state_dict(state)
    a, b = (mtl.edge_attribution(mtl.load(model), pairs) for model in (grouped, repeated))
    for i, reader in enumerate(a.readers):
        if "KV" not in reader:
            close(a.tensor[:, i], b.tensor[:, b.readers.index(reader)], a.tensor)
            continue
        layer, rest = reader[1:].split("KV")
        head, kind = rest.split(".")
        group = heads // kv
        members = [b.readers.index(f"L{layer}KV{int(head) * group + j}.{kind}") for j in range(group)]
        close(a.tensor[:, i], b.tensor[:, members].sum(1), a.tensor)


@SETTINGS
@given(layers=st.integers(1, 3), heads=st.sampled_from([2, 4]), seed=st.integers(0, 3), numbers=pairs_of)
def test_folding_norm_weights_into_the_matrices_changes_no_score(
    layers: int, heads: int, seed: int, numbers: tuple
) -> None:
    pairs = drawn(numbers)
    plain = tiny("llama", seed=seed, num_hidden_layers=layers, num_attention_heads=heads, hidden_size=8 * heads)
    folded = tiny("llama", seed=seed, num_hidden_layers=layers, num_attention_heads=heads, hidden_size=8 * heads)
    with torch.no_grad():
        for layer in folded.model.layers:
            for norm, readers in (
                (layer.input_layernorm, [getattr(layer.self_attn, f"{r}_proj") for r in "qkv"]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                for reader in readers:
                    reader.weight.mul_(norm.weight)
                norm.weight.fill_(1)
        folded.lm_head.weight.mul_(folded.model.norm.weight)
        folded.model.norm.weight.fill_(1)
    a, b = (mtl.edge_attribution(mtl.load(model), pairs) for model in (plain, folded))
    close(a.tensor, b.tensor)


@SETTINGS
@given(shape=models, numbers=pairs_of, seed=st.integers(0, 100))
def test_the_order_of_pairs_is_the_order_of_their_scores(shape: tuple, numbers: tuple, seed: int) -> None:
    model, pairs = hooked(shape), drawn(numbers)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    a = mtl.edge_attribution(model, pairs, per_pair=True).per_pair
    b = mtl.edge_attribution(model, pairs[order], per_pair=True).per_pair
    close(a[order], b)
