"""Activation patching against TransformerLens's own sweeps, and node and neuron attribution against interventions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformer_lens.patching as tl_patching

import mansu_tl as mtl
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.patching import PatchingResult, activation_patching
from mansu_tl.patching.cells import STREAMS, TITLES
from mansu_tl.patching.neurons import NeuronScores, neuron_attribution
from mansu_tl.runs.ablation import ablation
from mansu_tl.runs.passes import heads_last, run
from tests.test_attribution import random_pairs
from tests.tiny import FAMILIES, crossed, tiny


def theirs(name: str) -> object:
    return getattr(tl_patching, f"get_act_patch_{name}")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(
    ("component", "by", "reference"),
    [
        ("resid_pre", "position", "resid_pre"),
        ("attn_out", "position", "attn_out"),
        ("mlp_out", "position", "mlp_out"),
        ("z", "head", "attn_head_out_all_pos"),
        ("z", "head-position", "attn_head_out_by_pos"),
        ("q", "head", "attn_head_q_all_pos"),
        ("q", "head-position", "attn_head_q_by_pos"),
        ("k", "head", "attn_head_k_all_pos"),
        ("k", "head-position", "attn_head_k_by_pos"),
        ("v", "head", "attn_head_v_all_pos"),
        ("v", "head-position", "attn_head_v_by_pos"),
        ("pattern", "head", "attn_head_pattern_all_pos"),
        ("pattern", "head-position", "attn_head_pattern_by_pos"),
    ],
)
def test_equals_transformer_lens_own_sweep(family: str, component: str, by: str, reference: str) -> None:
    model = mtl.load(tiny(family))
    pairs = random_pairs(n=3)
    ours = activation_patching(model, pairs, component=component, by=by, cells_per_batch=3, per_pair=True)
    rows = torch.arange(len(pairs))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        last = logits[:, -1]
        return (last[rows, pairs.answers] - last[rows, pairs.distractors[:, 0]]).mean()

    with torch.no_grad():
        _, cache = model.run_with_cache(pairs.clean)
        found = theirs(reference)(model, pairs.corrupt, cache, metric).float()
    mine = ours.per_pair.mean(0)
    if by == "head-position":  # theirs: layer, position, head, but for patterns layer, head, position
        mine = mine.unflatten(0, (found.shape[0], -1))
        mine = mine if component == "pattern" else mine.transpose(1, 2)
    torch.testing.assert_close(mine, found[..., : mine.shape[-1]], rtol=0, atol=5e-6)
    shares = (found - ours.metric_corrupt) / (ours.metric_clean - ours.metric_corrupt)
    assert ours.tensor.flatten().sum() == pytest.approx(shares.sum().item(), rel=1e-3, abs=1e-3)


SWEEPS = [(c, b) for c in TITLES for b in (("position", "layer") if c in STREAMS else ("head", "head-position"))]


SWEPT = [*FAMILIES, "mistral, window 3", "gemma3, window 3"]
# Each family one way round, and the other way in make slow.
WAYS = [
    pytest.param(direction, family, marks=[pytest.mark.slow] if (i + j) % 2 else [])
    for i, family in enumerate(SWEPT)
    for j, direction in enumerate(("denoising", "noising"))
]


@pytest.mark.parametrize(("direction", "family"), WAYS)
def test_a_cell_of_every_sweep_equals_one_plain_hook(family: str, direction: str) -> None:
    name, _, window = family.partition(", window ")
    model = mtl.load(tiny(name, num_hidden_layers=3, **({"sliding_window": int(window)} if window else {})))
    parallel = Anatomy.of(model).parallel
    post = Anatomy.of(model).post_norms
    pairs = random_pairs(n=3, width=9, padded=True)
    base, other = (pairs.corrupt, pairs.clean) if direction == "denoising" else (pairs.clean, pairs.corrupt)
    streams = {
        "resid_pre": "blocks.{}.hook_in",
        "attn_out": "blocks.{}.ln1_post.hook_out" if post else "blocks.{}.attn.hook_out",
        "mlp_out": "blocks.{}.ln2_post.hook_out" if post else "blocks.{}.mlp.hook_out",
        "resid_post": "blocks.{}.hook_out",
        "z": "blocks.{}.attn.o.hook_in",
        "pattern": "blocks.{}.attn.hook_pattern",
    }
    _, cache = model.run_with_cache(other)
    _, own = model.run_with_cache(base)
    for component, by in SWEEPS:
        if component == "resid_mid" and parallel:
            continue
        result = activation_patching(
            model, pairs, component=component, by=by, direction=direction, per_pair=True, cells_per_batch=4
        )
        row, column, layer = (5, 6, 5 // Anatomy.of(model).n_kv_heads) if by == "head-position" else (1, 0, 1)
        if by == "head-position" and component not in ("k", "v"):
            layer = 5 // Anatomy.of(model).n_heads
        head = row % (Anatomy.of(model).n_kv_heads if component in ("k", "v") else Anatomy.of(model).n_heads)
        head = 0 if by == "head" else head
        if by == "position":
            row, column, layer = 1, 3, 1
        place = {"position": slice(3, 4), "head-position": slice(6, 7)}.get(by, slice(None))
        hook_name = streams.get(component, "blocks.{}.attn." + f"{component}.hook_out").format(layer)
        value = cache[hook_name] if component != "resid_mid" else None
        if component == "resid_mid":
            hook_name = streams["attn_out"].format(layer)
            value = cache[f"blocks.{layer}.ln2.hook_in"] - own[f"blocks.{layer}.hook_in"]

        def put(old, hook, value=value, component=component, place=place, head=head):
            new = old.clone()
            if component == "pattern":
                new[:, head, place] = value[:, head, place]
            elif component in STREAMS:
                new[:, place] = value[:, place]
            else:
                size = Anatomy.of(model).d_head
                a, b = (t.reshape(*t.shape[:2], -1, size) for t in (new, value))
                a[:, place, head] = b[:, place, head]
                new = a.reshape(old.shape)
            return new

        with torch.no_grad():
            logits = run(model, base, pairs.lengths, [(hook_name, put)]).float()
        expected = mtl.runs.logit_difference(logits, pairs)
        torch.testing.assert_close(result.per_pair[:, row, column], expected, rtol=0, atol=1e-5)
        assert result.tensor.shape == (len(result.rows), len(result.columns))


@pytest.mark.parametrize(("family", "kind"), crossed(FAMILIES, ["mean", "zero"]))
def test_zero_and_mean_ablation_put_those_values_in(family: str, kind: str) -> None:
    model, pairs = mtl.load(tiny(family)), random_pairs(n=3)
    how = ablation(model, kind, reference=random_pairs(n=5, seed=9) if kind == "mean" else None)
    values = how.activations(model, pairs)
    post = Anatomy.of(model).post_norms
    for component, hook_name, value in (
        ("mlp_out", "blocks.1.ln2_post.hook_out" if post else "blocks.1.mlp.hook_out", values.value("mlp_out", 1)),
        ("z", "blocks.1.attn.o.hook_in", values.value("z", 1)),
    ):
        result = activation_patching(
            model, pairs, component=component, direction="noising", ablation=how, per_pair=True
        )

        def put(old, hook, value=value, component=component):
            if component == "mlp_out":
                new = old.clone()
                new[:, 2] = value[:, 2]
                return new
            new = heads_last(old, Anatomy.of(model).n_heads).clone()
            new[:, :, 2] = value[:, :, 2]
            return new.reshape(old.shape)

        with torch.no_grad():
            logits = run(model, pairs.clean, pairs.lengths, [(hook_name, put)]).float()
        expected = mtl.runs.logit_difference(logits, pairs)
        torch.testing.assert_close(result.per_pair[:, 1, 2], expected, rtol=0, atol=1e-5)
    assert result.metric_corrupt == pytest.approx(
        mtl.runs.logit_difference(values.logits, pairs).mean().item(), abs=1e-5
    )


def test_an_interrupted_sweep_leaves_the_model_as_it_was() -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    with torch.no_grad():
        before = model(pairs.clean)
    calls = 0

    def interrupted(logits: torch.Tensor, pairs: mtl.data.PromptPairs) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return mtl.runs.logit_difference(logits, pairs)

    for component in ("resid_pre", "z"):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            activation_patching(model, pairs, component=component, cells_per_batch=2, metric=interrupted)
        with torch.no_grad():
            assert torch.equal(model(pairs.clean), before)


def test_transformer_lens_own_statistics_can_be_had() -> None:
    model, pairs = mtl.load(tiny("gpt2")), random_pairs(n=6)
    result = activation_patching(model, pairs, component="z", per_pair=True)
    there = result.to_transformer_lens()
    low, high = there.bootstrap_ci(n_resamples=200)
    assert (low <= there.mean()).all() and (there.mean() <= high).all()
    torch.testing.assert_close(
        there.effect().mean(-1), (result.per_pair.mean(0) - result.metric_corrupt), atol=1e-5, rtol=0
    )
    assert len(there.to_dataframe()) == 6 * result.tensor.numel()
    with pytest.raises(MansuError, match="kept no values per pair"):
        activation_patching(model, pairs).to_transformer_lens()


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
    ours = neuron_attribution(model, pairs, signed=True).tensor
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


def test_neuron_scores_add_up_over_positions_and_survive_a_round_trip(tmp_path: Path) -> None:
    model, pairs = mtl.load(tiny("gemma3")), random_pairs(n=5, padded=True)
    for options in ({}, {"at": "clean"}, {"steps": 3}):
        scores = neuron_attribution(model, pairs, signed=True, per_position="end", batch_size=2, **options)
        whole = neuron_attribution(model, pairs, signed=True, **options)
        torch.testing.assert_close(scores.tensor, whole.tensor, rtol=0, atol=2e-6)
        torch.testing.assert_close(scores.per_position.sum(0), whole.tensor, rtol=0, atol=2e-6)
    both, ends = neuron_attribution(model, pairs, signed=True), ("clean", "corrupt")
    halves = sum(neuron_attribution(model, pairs, signed=True, at=end).tensor for end in ends) / 2
    torch.testing.assert_close(both.tensor, halves, rtol=0, atol=2e-6)
    again = NeuronScores.load(scores.save(tmp_path / "n.safetensors"))
    assert torch.equal(again.tensor, scores.tensor)
    assert again.positions == scores.positions
    assert scores.to_dataframe()["score"].abs().is_monotonic_decreasing
    with pytest.raises(MansuError, match="unknown end 'middle'"):
        neuron_attribution(model, pairs, at="middle")
    with pytest.raises(MansuError, match="steps=0"):
        neuron_attribution(model, pairs, steps=0)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("hook_resid_pre", "resid_pre"), ("attn.hook_z", "z"), ("hook_pattern", "pattern")]
)
def test_transformer_lens_names_of_activations_mean_the_same(theirs: str, ours: str) -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    first, second = (activation_patching(model, pairs, component=name) for name in (theirs, ours))
    assert torch.equal(first.tensor, second.tensor) and first.component == second.component


def test_what_transformer_lens_asks_for_otherwise_is_told_the_way() -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    with pytest.raises(MansuError, match=r"component='resid_pre' and read row '1'"):
        activation_patching(model, pairs, component="blocks.1.hook_resid_pre")
    with pytest.raises(MansuError, match="unknown component 'hook_embed'"):
        activation_patching(model, pairs, component="hook_embed")

    def last_logit(logits):
        return logits[:, -1].mean()

    for ask in (activation_patching, mtl.edge_attribution, mtl.patching.node_attribution):
        with pytest.raises(
            MansuError, match=r"metric 'last_logit': it is called with .* write it as f\(logits, pairs\)"
        ):
            ask(model, pairs, metric=last_logit)


def test_bad_input_is_refused() -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    with pytest.raises(MansuError, match="unknown component 'resid'"):
        activation_patching(model, pairs, component="resid")
    with pytest.raises(MansuError, match="unknown direction 'both'"):
        activation_patching(model, pairs, direction="both")
    with pytest.raises(MansuError, match="z cannot be swept by 'position'; choose head or head-position"):
        activation_patching(model, pairs, component="z", by="position")
    with pytest.raises(MansuError, match="resid_mid does not exist in parallel blocks"):
        activation_patching(mtl.load(tiny("gpt_neox")), pairs, component="resid_mid")
    with pytest.raises(MansuError, match="zero ablation has no run to put clean values into"):
        activation_patching(model, pairs, ablation=ablation(model, "zero"))
    with pytest.raises(MansuError, match="mean ablation has no values for pattern"):
        mean = ablation(model, "mean", reference=pairs)
        activation_patching(model, pairs, component="pattern", direction="noising", ablation=mean)
    with pytest.raises(MansuError, match="cells_per_batch=0"):
        activation_patching(model, pairs, cells_per_batch=0)
    with pytest.raises(MansuError, match="2 tokens for 7 positions"):
        activation_patching(model, pairs, tokens=["a", "b"])
    with pytest.raises(MansuError, match="no difference to restore"):
        activation_patching(
            model, mtl.data.PromptPairs.from_tokens(pairs.clean, pairs.clean, pairs.answers, pairs.distractors)
        )
