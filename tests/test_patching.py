"""Activation patching against TransformerLens's own sweeps, and node and neuron attribution against interventions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformer_lens.patching as tl_patching

import mansu_tl as mtl
from mansu_tl.errors import MansuError
from mansu_tl.patching import PatchingResult, activation_patching
from mansu_tl.patching.neurons import neuron_attribution
from tests.test_attribution import random_pairs
from tests.tiny import tiny


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("component", "reference"),
    [
        ("resid_pre", tl_patching.get_act_patch_resid_pre),
        ("attn_out", tl_patching.get_act_patch_attn_out),
        ("mlp_out", tl_patching.get_act_patch_mlp_out),
        ("z", tl_patching.get_act_patch_attn_head_out_all_pos),
    ],
)
def test_equals_transformer_lens_own_sweep(family: str, component: str, reference) -> None:
    model = mtl.load(tiny(family))
    pairs = random_pairs(n=3)
    ours = activation_patching(model, pairs, component=component, cells_per_batch=3)
    rows = torch.arange(len(pairs))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        last = logits[:, -1]
        value = (last[rows, pairs.answers] - last[rows, pairs.distractors[:, 0]]).mean()
        return (value - ours.metric_corrupt) / (ours.metric_clean - ours.metric_corrupt)

    with torch.no_grad():
        _, cache = model.run_with_cache(pairs.clean)
        theirs = reference(model, pairs.corrupt, cache, metric)
    torch.testing.assert_close(ours.tensor, theirs.float(), rtol=0, atol=2e-5)


def test_noising_and_denoising_meet_at_the_ends() -> None:
    model = mtl.load(tiny("llama"))
    pairs = random_pairs(n=3)
    denoise = activation_patching(model, pairs)
    noise = activation_patching(model, pairs, direction="noising")
    # Before layer 0 only the two changed tokens differ: all other positions restore and destroy nothing.
    same = [p for p in range(pairs.clean.shape[1]) if torch.equal(pairs.clean[:, p], pairs.corrupt[:, p])]
    assert denoise.tensor[0, same].abs().max() < 1e-5
    assert noise.tensor[0, same].abs().max() < 1e-5
    assert denoise.tensor.shape == (2, 7)


def test_results_survive_a_round_trip(tmp_path: Path) -> None:
    result = activation_patching(mtl.load(tiny("llama")), random_pairs(n=2), component="z")
    again = PatchingResult.load(result.save(tmp_path / "p.safetensors"))
    assert torch.equal(again.tensor, result.tensor)
    assert again.to_dataframe().equals(result.to_dataframe())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neuron_attribution_equals_the_slope_of_patching_one_neuron(family: str) -> None:
    model = mtl.load(tiny(family))
    pairs = random_pairs(n=2)
    ours = neuron_attribution(model, pairs, signed=True)
    rows = torch.arange(len(pairs))
    name, neurons, step = "blocks.1.mlp.out.hook_in", [0, 5, 11], 1e-2
    _, clean = model.run_with_cache(pairs.clean)
    _, corrupt = model.run_with_cache(pairs.corrupt)
    for neuron in neurons:
        slopes = []
        for tokens in (pairs.clean, pairs.corrupt):
            values = []
            for sign in (1, -1):

                def shift(h: torch.Tensor, hook: object, sign: int = sign, neuron: int = neuron) -> torch.Tensor:
                    moved = h.clone()
                    moved[..., neuron] += sign * step * (clean[name] - corrupt[name])[..., neuron]
                    return moved

                with torch.no_grad():
                    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, shift)])[:, -1].double()
                values.append((logits[rows, pairs.answers] - logits[rows, pairs.distractors[:, 0]]).mean())
            slopes.append((values[0] - values[1]) / (2 * step))
        assert ours[1, neuron].item() == pytest.approx(sum(s.item() for s in slopes) / 2, rel=0.02, abs=2e-4)


def test_bad_input_is_refused() -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    with pytest.raises(MansuError, match="unknown component 'resid'"):
        activation_patching(model, pairs, component="resid")
    with pytest.raises(MansuError, match="unknown direction 'both'"):
        activation_patching(model, pairs, direction="both")
    with pytest.raises(MansuError, match="2 tokens for 7 positions"):
        activation_patching(model, pairs, tokens=["a", "b"])
    with pytest.raises(MansuError, match="no difference to restore"):
        activation_patching(
            model, mtl.PromptPairs.from_tokens(pairs.clean, pairs.clean, pairs.answers, pairs.distractors)
        )
