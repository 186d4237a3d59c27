"""Shortened runs against plain transformers, and what happens where a release breaks them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformers import PreTrainedModel

import mansu_tl as mtl
from mansu_tl.circuit import masked_run
from mansu_tl.errors import MansuError
from mansu_tl.models import cache
from mansu_tl.patching import patterns
from mansu_tl.runs import resume
from tests.test_attribution import random_pairs
from tests.tiny import FAMILIES, tiny


def layers_of(hf: PreTrainedModel) -> torch.nn.ModuleList:
    return next(module for module in hf.modules() if isinstance(module, torch.nn.ModuleList))


def stream_shares(hf: PreTrainedModel, clean: torch.Tensor, corrupt: torch.Tensor, tokens: tuple[int, int]) -> Any:
    """Share restored by the clean stream in front of every layer and position, with torch's own hooks alone."""
    layers, kept = layers_of(hf), {}

    def difference(tokens_: torch.Tensor) -> float:
        with torch.no_grad():
            logits = hf(tokens_, use_cache=False).logits[0, -1].double()
        return (logits[tokens[0]] - logits[tokens[1]]).item()

    def hooked(layer: int, change: Callable[[torch.Tensor], torch.Tensor], run: torch.Tensor) -> float:
        def pre(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        handle = layers[layer].register_forward_pre_hook(pre, with_kwargs=True)
        try:
            return difference(run)
        finally:
            handle.remove()

    def keep(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda stream: kept.setdefault(layer, stream)

    def put(layer: int, position: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(stream: torch.Tensor) -> torch.Tensor:
            out = stream.clone()
            out[:, position] = kept[layer][:, position]
            return out

        return change

    for layer in range(len(layers)):
        up = hooked(layer, keep(layer), clean)
    down = difference(corrupt)
    return torch.tensor(
        [
            [(hooked(i, put(i, p), corrupt) - down) / (up - down) for p in range(clean.shape[1])]
            for i in range(len(layers))
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_over_positions_equals_plain_transformers(family: str) -> None:
    hf = tiny(family).eval()
    hf.set_attn_implementation("eager")
    clean, corrupt = torch.tensor([[5, 9, 11, 30, 7, 8]]), torch.tensor([[5, 9, 41, 30, 17, 8]])
    want = stream_shares(hf, clean, corrupt, (12, 13))
    pairs = mtl.data.PromptPairs.from_tokens(clean, corrupt, torch.tensor([12]), torch.tensor([13]))
    got = mtl.activation_patching(mtl.load(hf), pairs)
    torch.testing.assert_close(got.tensor.double(), want.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantized", [None, "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generating_with_a_cache_equals_growing_the_prompt(family: str, quantized: str | None) -> None:
    # 4-bit blocks are 64 wide.
    sizes: dict[str, int] = {"hidden_size": 64, "n_inner" if family == "gpt2" else "intermediate_size": 64}
    if family not in ("gpt2", "gpt_neox"):
        sizes["head_dim"] = 16
    model, tokens = mtl.load(tiny(family, **sizes), quantized=quantized), torch.tensor([[5, 9, 11, 30, 7]])
    grown = tokens
    for _ in range(5):
        grown = torch.cat([grown, model(grown)[:, -1].argmax(-1, keepdim=True)], 1)
    said = model.generate(
        tokens, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
    )
    assert torch.equal(said, grown)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_resumed_run_that_lost_its_earlier_positions_is_an_error_that_names_the_versions(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mtl.load(tiny(family))
    monkeypatch.setattr(AttentionBridge, "_update_kv_cache", lambda self, k, v, **kwargs: (k, v))
    with pytest.raises(MansuError, match=rf"resumed run: .* transformers {version('transformers')}.*constraints.txt"):
        mtl.activation_patching(model, random_pairs(n=2))
    # It is no number the second time either.
    with pytest.raises(MansuError, match="resumed run"):
        mtl.activation_patching(model, random_pairs(n=2))


def test_edge_patching_that_does_not_give_the_clean_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs(n=2)
    scores = mtl.edge_attribution(model, pairs, steps=1)
    circuit = mtl.circuit.Circuit.top(scores, 10)
    plain = masked_run.normed
    monkeypatch.setattr(masked_run, "normed", lambda x, norm: 1.1 * plain(x, norm))
    with pytest.raises(MansuError, match="edge patching against corrupt: .* differs from the plain run"):
        mtl.circuit.faithfulness(model, circuit, pairs)


def test_attention_patterns_that_do_not_give_the_plain_run_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs(n=2)
    plain = patterns._run
    monkeypatch.setattr(patterns, "_run", lambda *args: [p.roll(1, -1) for p in plain(*args)])
    with pytest.raises(MansuError, match="attention patterns: .* differs from the plain run"):
        mtl.patching.node_attribution(model, pairs, qk_fix=True)


def test_the_check_runs_once_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain = [], resume._unpatched
    monkeypatch.setattr(resume, "_unpatched", lambda model, base: made.append(model) or plain(model, base))
    first, second, pairs = mtl.load(tiny("llama")), mtl.load(tiny("llama")), random_pairs(n=2)
    for model in (first, first, second):
        mtl.activation_patching(model, pairs)
    assert made == [first, second]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_check_leaves_room_for_a_dtypes_rounding(dtype: torch.dtype) -> None:
    model = mtl.load(tiny("llama"), dtype=dtype)
    mtl.activation_patching(model, random_pairs(n=4))


def test_the_cache_is_found_by_its_type() -> None:
    for family in FAMILIES:
        hf = tiny(family).eval()
        name = cache.cache_argument(hf)
        first = hf(torch.tensor([[5, 9, 11]]), use_cache=True)
        second = hf(torch.tensor([[30]]), use_cache=True, **{name: cache.cache_of(first)}).logits
        torch.testing.assert_close(second[:, -1], hf(torch.tensor([[5, 9, 11, 30]])).logits[:, -1])
