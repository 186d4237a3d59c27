"""Edits, the floor inside the loop, retain statistics, MANSU and the baselines on a tiny task."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.data import Sequences
from mansu_tl.data.wording import same_wording
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, fingerprint, linear_weights, parameters, plain
from mansu_tl.models.low_rank import low_rank_factors
from mansu_tl.quantization import quantizer
from mansu_tl.runs.values import by_length, sequence_logits, watched
from mansu_tl.unlearning import Edit, MansuSettings, method_flags, methods, unlearn
from mansu_tl.unlearning.batches import OriginalText
from mansu_tl.unlearning.mansu.adversary import Means, attacked
from mansu_tl.unlearning.mansu.candidates import circuit_weights
from mansu_tl.unlearning.mansu.floor import Floor
from mansu_tl.unlearning.mansu.plan import plan
from mansu_tl.unlearning.mansu.solver import _Mansu
from mansu_tl.unlearning.mansu.terms import forget_loss, ignorance, lost_odds, retain_loss
from mansu_tl.unlearning.retain_statistics import diagonal_fisher, input_moments, sequence_loss
from tests.test_attribution import random_pairs
from tests.tiny import FAMILIES, embedded_task, sliced_task, tiny

NOTHING = Sequences(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long))
QUICK = {"mansu": {"steps": 12, "learning_rate": 0.5, "fisher_sequences": 8, "adversary_weight": 0.0}}


@pytest.fixture(scope="module")
def task():
    return sliced_task(24, retain=48)


@pytest.fixture(scope="module")
def circuit(model, task) -> Circuit:
    return mtl.discover_circuit(model, task.forget_pairs, faithfulness=0.5, steps=2)


@pytest.fixture(scope="module")
def edit(model, task, circuit) -> Edit:
    return unlearn(model, task, "mansu", circuit=circuit, seed=3, **QUICK["mansu"])


def nf4_codes(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    packed, state = bnb.quantize_4bit(value.contiguous(), quant_type="nf4", blocksize=64)
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], 1).flatten(), state.absmax


def test_mansu_changes_the_code_of_every_weight_it_edits_and_of_no_other(model, edit) -> None:
    edited = edit.apply(model)
    before, after = parameters(model), parameters(edited)
    assert edit.n_weights > 0
    for name in before:
        if name not in linear_weights(model):
            assert torch.equal(before[name], after[name])
            continue
        (a, scale_a), (b, scale_b) = nf4_codes(before[name]), nf4_codes(after[name])
        named = torch.zeros(a.numel(), dtype=torch.bool)
        if name in edit.indices:
            named[edit.indices[name]] = True
        assert torch.equal(a != b, named)
        assert torch.equal(scale_a, scale_b)


def test_mansu_stays_within_the_circuit_and_the_budget(model, task, circuit, edit) -> None:
    masks = circuit_weights(model, circuit, task.forget_pairs, 0.25)
    for name, index in edit.indices.items():
        assert masks[name].flatten()[index].all()
    assert edit.linear_share(model) <= 0.0195


def test_the_same_seed_gives_the_same_edit_and_another_seed_another(model, task, circuit, edit) -> None:
    again = unlearn(model, task, "mansu", circuit=circuit, seed=3, **QUICK["mansu"])
    assert edit.indices.keys() == again.indices.keys()
    assert all(torch.equal(edit.new[name], again.new[name]) for name in edit.new)
    other = unlearn(model, task, "mansu", circuit=circuit, seed=4, **QUICK["mansu"])
    assert any(not torch.equal(edit.indices[n], other.indices.get(n, edit.indices[n][:0])) for n in edit.indices)


@pytest.mark.parametrize("method", [m for m in methods() if not method_flags(m).takes_circuit])
def test_baselines_lower_the_forget_answers_and_are_seeded(method: str, model, task) -> None:
    def run() -> Edit:
        rate = {"rmu": 3e-3, "suppressor": 3e-3}.get(method, 3e-4)
        return unlearn(
            model, task, method, seed=1, learning_rate=rate, max_steps=12, check_every=4, stop_over_chance=-100.0
        )

    first, second = run(), run()
    assert all(torch.equal(first.new[name], second.new[name]) for name in first.new)
    before = mtl.accuracy(model, task.questions["forget"]).log_odds.mean()
    after = mtl.accuracy(first.apply(model), task.questions["forget"]).log_odds.mean()
    assert after < before - 1


def test_an_edit_is_applied_reverted_saved_and_loaded_bit_for_bit(model, edit, tmp_path: Path) -> None:
    untouched = fingerprint(model)
    edited = edit.apply(model)
    assert fingerprint(model) == untouched
    assert fingerprint(edit.revert(edited)) == untouched
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert fingerprint(again.apply(model)) == fingerprint(edited)
    assert again.facts == edit.facts
    assert edit.to_dataframe()["edited"].sum() == edit.n_weights
    with pytest.raises(MansuError, match="made for another model"):
        edit.apply(mtl.load(tiny("llama")))
    with pytest.raises(MansuError, match="does not hold the edit's values"):
        edit.revert(model)


def test_an_edited_model_survives_the_way_through_a_folder(model, edit, tmp_path: Path) -> None:
    edited = edit.apply(model)
    mtl.save(edited, tmp_path / "m")
    assert fingerprint(mtl.load(tmp_path / "m")) == fingerprint(edited)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_circuit_weights_are_the_slices_of_the_circuit(family: str) -> None:
    model = mtl.load(tiny(family))
    pairs = random_task_pairs()
    scores = mtl.edge_attribution(model, pairs)
    cmap = Anatomy.of(model)
    kv = cmap.n_kv_heads
    mask = torch.zeros_like(scores.exists)
    for writer, reader in (("embed", f"L0KV{kv - 1}.v"), (f"L0H{cmap.n_heads - 1}", "logits")):
        mask[scores.writers.index(writer), scores.readers.index(reader)] = True
    circuit = Circuit.from_mask(scores, mask, "by hand")
    masks = circuit_weights(model, circuit, pairs, 0.25)
    heads = {w for w in circuit.nodes if w != "embed"}
    expected = {f"{h}.o" for h in heads} | {f"L0KV{kv - 1}.v"}
    want: dict[str, torch.Tensor] = {}
    for name in expected:
        for piece in cmap.slices(name):
            if piece.parameter in linear_weights(model):
                full = want.setdefault(
                    piece.parameter, torch.zeros_like(parameters(model)[piece.parameter], dtype=torch.bool)
                )
                full.narrow(piece.dim, piece.start, piece.stop - piece.start).fill_(True)
    # Heads that share the KV head are on the path too: through v, every head of the group is reached.
    for name, part in want.items():
        assert masks[name][part].all()
    assert not any("mlp" in name for name in masks)


def random_task_pairs():
    from tests.test_attribution import random_pairs

    return random_pairs()


def test_the_floor_keeps_unmoved_weights_bit_for_bit_and_moves_the_rest_across() -> None:
    grid = quantizer("nf4")
    weight = 0.05 * torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    floor = Floor([grid], {"w": weight}, {"w": torch.ones(32, 64, dtype=torch.bool)})
    # One weight of each block of 64 carries the absmax.
    assert floor.size == 32 * 64 - 32
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(floor.size, generator=generator)
    stored, rounded, changed = floor.realise(latent)
    assert 0.2 < changed.double().mean() < 0.9
    assert (stored[~changed] == 0).all()
    assert (rounded[~changed] == 0).all()
    final = floor.final("w", latent, torch.ones(floor.size, dtype=torch.bool))
    (before, scale), (after, scale_after) = nf4_codes(weight), nf4_codes(final)
    index = floor.where["w"]
    assert torch.equal((before != after)[index], changed)
    assert torch.equal(scale, scale_after)
    torch.testing.assert_close(
        rounded, (grid.roundtrip(final) - grid.roundtrip(weight)).flatten()[index], rtol=0, atol=1e-6
    )
    # The gradient is the identity in units of bins.
    leaf = latent.clone().requires_grad_()
    (grad,) = torch.autograd.grad(floor.realise(leaf)[0].sum(), leaf)
    torch.testing.assert_close(grad, floor.width)


def test_a_frozen_weight_is_never_edited() -> None:
    weight = 0.05 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    floor = Floor([quantizer("nf4")], {"w": weight}, {"w": torch.ones(8, 64, dtype=torch.bool)})
    allowed = torch.zeros(floor.size, dtype=torch.bool)
    assert torch.equal(floor.final("w", torch.full((floor.size,), 3.0), allowed), weight)


def test_input_moments_are_the_mean_outer_product_of_what_each_matrix_reads(model, task) -> None:
    hf = plain(model)
    name = "model.layers.1.mlp.down_proj.weight"
    text = task.retain_text[slice(0, 5)]
    seen = []
    handle = hf.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    for i in range(5):
        hf(text.tokens[i : i + 1, : int(text.lengths[i])])
    handle.remove()
    rows = torch.cat([x[0] for x in seen])
    expected = rows.T @ rows / rows.shape[0]
    torch.testing.assert_close(input_moments(hf, [name], text)[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_moments_behind_a_norm_are_about_what_reaches_the_stream(family: str) -> None:
    """E |what a change of the matrix makes the norm give out|^2 in all, by the norm itself: to first order, and but for
    the part of the change along the output, which only moves its length."""
    hf, name = plain(mtl.load(tiny(family))), "model.layers.0.mlp.down_proj.weight"
    norm = hf.get_submodule("model.layers.0.post_feedforward_layernorm")
    with torch.no_grad():
        norm.weight.zero_()  # a factor of 1
    text = Sequences(torch.randint(3, 60, (5, 6)), torch.tensor([6, 4, 6, 5, 6]))
    kept: dict[str, torch.Tensor] = {}

    def look(key, x, left):
        kept["x"], kept["left"] = x[text.real], left[text.real]

    with torch.no_grad(), watched(hf, [name], look):
        hf(text.tokens)
    change = 1e-4 * torch.randn(hf.get_parameter(name).shape)
    moved = kept["x"] @ change.T
    moved -= kept["left"] * (moved * kept["left"]).sum(1, keepdim=True) / kept["left"].square().sum(1, keepdim=True)
    exact = (norm(kept["left"] + moved) - norm(kept["left"])).square().sum(1).mean()
    moment = input_moments(hf, [name], text, behind_norms=True)[name]
    # What lies along the output is no change of direction: it is taken out of the moment's prediction too.
    length = kept["left"].square().mean(1).sqrt()[:, None]
    along = ((kept["x"] @ change.T - moved) / length).square().sum(1).mean()
    torch.testing.assert_close(((change @ moment) * change).sum() - along, exact, rtol=1e-2, atol=0.0)
    plainly = input_moments(hf, [name], text)[name]
    assert not torch.allclose(plainly / plainly.trace(), moment / moment.trace(), rtol=0.05)


def test_fisher_is_the_mean_squared_gradient_of_each_sequence(task) -> None:
    hf = plain(mtl.load("pocket-never"))
    name = "model.layers.0.self_attn.o_proj.weight"
    text = task.retain_text[slice(0, 3)]
    fisher = diagonal_fisher(hf, [name], text)[name]
    values = {k: v.detach() for k, v in hf.named_parameters()}
    # The largest entry: the loss is taken in float32, which would drown a small slope.
    i, j = divmod(int(fisher.argmax()), fisher.shape[1])
    weight, step = values[name], 1e-3
    slopes = []
    for row in range(3):
        one = text[slice(row, row + 1)]
        ends = []
        for sign in (1, -1):
            moved = weight.double().clone()
            moved[i, j] += sign * step
            double = {k: v.double() for k, v in values.items()} | {name: moved}
            ends.append(sequence_loss(hf.double(), double, one).item())
        hf.float()
        slopes.append((ends[0] - ends[1]) / (2 * step))
    assert fisher[i, j].item() == pytest.approx(sum(s * s for s in slopes) / 3, rel=0.02, abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_information_equals_one_gradient_a_sequence(family: str) -> None:
    model, pairs = mtl.load(tiny(family)), random_pairs(n=5, padded=True)
    hf, text = plain(model), Sequences(pairs.clean, pairs.lengths)
    names, values = (
        list(linear_weights(model)),
        {name: value.detach() for name, value in plain(model).named_parameters()},
    )
    wanted = {name: torch.zeros_like(values[name]) for name in names}
    for i, length in enumerate(text.lengths.tolist()):
        row = Sequences(text.tokens[i : i + 1, :length], text.lengths[i : i + 1])
        leaves = {name: values[name].clone().requires_grad_() for name in names}
        loss = sequence_loss(hf, {**values, **leaves}, row)
        for name, grad in zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            wanted[name] += grad.square() / len(text)
    found = diagonal_fisher(hf, names, text)
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6 * wanted[name].max().item())


def test_sequences_run_apart_by_length_say_the_same(model) -> None:
    hf, values = plain(model), dict(plain(model).named_parameters())
    task = embedded_task()
    text = task.retain_text[list(range(0, 1024, 16))]
    groups = by_length(text.lengths)
    assert len(groups) == 2 and sorted(torch.cat(groups).tolist()) == list(range(len(text)))
    assert len(by_length(torch.full((64,), 9))) == 1 and len(by_length(torch.tensor([3, 30]))) == 1
    found = sequence_logits(hf, values, text)
    logits = hf(text.tokens, use_cache=False).logits
    assert len(found.targets) == int((text.lengths - 1).sum())
    assert len(set(zip(found.rows.tolist(), found.places.tolist(), strict=True))) == len(found.targets)
    assert torch.equal(found.targets, text.tokens[found.rows, found.places + 1])
    torch.testing.assert_close(found.logits, logits[found.rows, found.places], rtol=0, atol=2e-5)
    rows = torch.tensor([5, 60, 2, 2])
    some = sequence_logits(hf, values, text[rows])
    for asked in (0, 10_000):  # computed, and looked up
        original = OriginalText(hf, values, text, asked)
        assert (original._table is None) == (asked == 0)
        torch.testing.assert_close(original(rows, some), some.logits, rtol=0, atol=2e-5)


def test_how_far_never_seen_names_lie_apart_is_exact_where_what_they_share_is_large(model) -> None:
    hf, task = plain(model), embedded_task()
    pairs, unseen = task.forget_pairs[[5]], task.unseen
    hf.model.embed_tokens.weight.data[:, 0] += (
        30.0  # as real models have it: a direction in which every stream is large
    )
    found = ignorance(hf, pairs, unseen)
    with torch.no_grad():
        streams = hf(unseen.tokens, output_hidden_states=True).hidden_states[1:]
    last = torch.stack([stream[torch.arange(len(unseen)), unseen.lengths - 1] for stream in streams], 1).double()
    words = pairs.clean.masked_fill(pairs.changed, -1)
    closest = same_wording(words, pairs.lengths, unseen)[0]
    own = last[closest]
    wanted = (own - own.mean(0)).square().sum(-1).mean(0)
    torch.testing.assert_close(found.spread[0].double(), wanted, rtol=1e-4, atol=0)


def test_ignorance_is_the_mean_answer_to_never_seen_names_in_the_same_words(model) -> None:
    full = embedded_task()
    unknown = ignorance(plain(model), full.forget_pairs, full.unseen)
    assert len(unknown.wording) == len(full.forget_pairs)
    torch.testing.assert_close(unknown.reference.sum(1), torch.ones(len(unknown.reference)), rtol=0, atol=1e-5)
    # By hand for one pair: the never-seen prompts that differ from it in the name alone.
    pair = full.forget_pairs[[5]]
    length = int(pair.lengths)
    name = (pair.clean != pair.corrupt)[0, :length].nonzero()[:, 0].tolist()
    same = [
        i
        for i in range(len(full.unseen))
        if int(full.unseen.lengths[i]) == length
        and all(p in name or full.unseen.tokens[i, p] == pair.clean[0, p] for p in range(length))
    ]
    assert len(same) >= 4
    with torch.no_grad():
        mean = plain(model)(full.unseen.tokens[same, :length]).logits[:, -1].softmax(-1).mean(0)
    fifth = unknown.of(torch.tensor([5]))
    torch.testing.assert_close(fifth.reference[0], mean, rtol=0, atol=1e-5)
    assert fifth.pool[0, pair.answers].all()
    # Four wordings, not one row for each of the pairs.
    assert len(unknown.reference) < len(full.forget_pairs) / 4  # a row a wording, not a row a pair


def test_forget_loss_by_hand() -> None:
    reference = torch.tensor([[0.5, 0.25, 0.25]])
    pool = torch.tensor([[True, True, False]])
    settings = MansuSettings(divergence_weight=1.0, margin=0.1, margin_weight=1.0, band=0.5, band_weight=1.0)
    at_reference = forget_loss(reference.log(), reference, pool, torch.tensor([0]), settings)
    assert at_reference.item() == pytest.approx(0.1, abs=1e-6)  # only the margin is left
    logits = torch.tensor([[0.8, 0.1, 0.1]]).log()
    divergence = 0.5 * torch.tensor(0.5 / 0.8).log() + 2 * 0.25 * torch.tensor(0.25 / 0.1).log()
    hinge = torch.tensor(0.8 / 0.5).log() + 0.1
    gap = torch.tensor([0.8 / 0.5, 0.1 / 0.25]).log()
    centred = (gap - gap.mean()).abs()
    huber = torch.where(centred < 0.5, centred**2 / 2, 0.5 * (centred - 0.25)).mean()
    loss = forget_loss(logits, reference, pool, torch.tensor([0]), settings)
    assert loss.item() == pytest.approx((divergence + hinge + huber).item(), abs=1e-5)


def test_an_attack_is_what_adam_does_on_the_facts_it_has(model) -> None:
    hf, pairs = plain(model), embedded_task().forget_pairs
    facts = pairs.fact_numbers()
    assert len(set(facts.tolist())) == 48
    values = {name: value.detach() for name, value in hf.named_parameters()}
    name = "model.layers.1.mlp.down_proj.weight"
    settings = MansuSettings(adversary_facts=12, adversary_steps=1, adversary_rate=1e-3, retain_batch=10_000)
    attack = attacked(hf, values, (name,), pairs, facts, settings, torch.Generator().manual_seed(3), NOTHING)
    left = set(facts[attack.others].tolist())
    assert len(left) == 36
    trained = pairs[torch.tensor([i for i, fact in enumerate(facts.tolist()) if fact not in left])]
    weight = dict(hf.named_parameters())[name].requires_grad_()
    logits = hf(trained.clean).logits[torch.arange(len(trained)), trained.lengths - 1].float()
    gradient = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, trained.answers), weight)[0]
    # Adam's first step: the learning rate times g / (|g| + 1e-8).
    expected = -1e-3 * gradient / (gradient.abs() + 1e-8)
    clear = gradient.abs() > 1e-5  # elsewhere the order of the batch decides the sign
    torch.testing.assert_close(attack.change[name][clear], expected[clear], rtol=0, atol=2e-5)
    again = attacked(hf, values, (name,), pairs, facts, settings, torch.Generator().manual_seed(3), NOTHING)
    assert torch.equal(again.change[name], attack.change[name])


def test_an_attackers_means_are_drawn_around_the_settings() -> None:
    settings = MansuSettings(adversary_facts=12, adversary_steps=24, adversary_rate=3e-4)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert Means.drawn(settings, 48, 1.0, generator) == Means(12, 24, 3e-4)
    assert torch.equal(generator.get_state(), before)  # a run without a spread draws what it always drew
    many = [Means.drawn(settings, 48, 4.0, generator) for _ in range(4000)]
    for key, middle in (("facts", 12), ("steps", 24), ("rate", 3e-4)):
        shares = torch.tensor([getattr(each, key) / middle for each in many]).log2() / 2
        assert -1.1 < shares.min() < -0.95 and 0.95 < shares.max() < 1.1
        assert shares.mean().abs() < 0.03
        assert shares.std().item() == pytest.approx(1 / 3**0.5, abs=0.03)  # that of an even draw between -1 and 1
    # One fact at least is attacked and one is left.
    assert {Means.drawn(MansuSettings(), 3, 64.0, generator).facts for _ in range(200)} == {1, 2}


def test_attackers_kinds_come_alike_often() -> None:
    settings = MansuSettings(adversary_kinds="weights+adapters+near", adversary_facts=12)
    generator = torch.Generator().manual_seed(0)
    many = [Means.drawn(settings, 48, 1.0, generator) for _ in range(3000)]
    for kind, facts, rate in (("weights", 12, 3e-4), ("adapters", 12, 3e-3), ("near", 0, 3e-4)):
        own = [each for each in many if each.kind == kind]
        assert len(own) / 3000 == pytest.approx(1 / 3, abs=0.03)
        assert {each.facts for each in own} == {facts}
        assert all(each.rate == pytest.approx(rate) for each in own)


def test_an_attacker_with_adapters_trains_factors_of_eight_columns(model) -> None:
    hf, pairs = plain(model), embedded_task().forget_pairs
    values = {name: value.detach() for name, value in hf.named_parameters()}
    name, facts = "model.layers.1.mlp.down_proj.weight", pairs.fact_numbers()
    settings = MansuSettings(adversary_kinds="adapters", adversary_steps=1, adversary_rate=1e-3, retain_batch=1000)
    found = attacked(hf, values, (name,), pairs, facts, settings, torch.Generator().manual_seed(3), NOTHING)
    assert torch.linalg.matrix_rank(found.change[name]) == 8
    # The same by hand: B starts at zero, so the first step of Adam is its gradient's sign times the rate, ten times ours.
    generator = torch.Generator().manual_seed(3)
    known = torch.isin(facts, torch.randperm(48, generator=generator)[:12])
    assert sorted(found.others.tolist()) == (~known).nonzero()[:, 0].tolist()
    seed = int(torch.randint(2**31, (1,), generator=generator))
    first, second = low_rank_factors(values, [name], 8, seed)[name]
    second.requires_grad_()
    rows = pairs[known]
    there = {**values, name: values[name] + 16 / 8 * first @ second}
    logits = torch.func.functional_call(hf, there, (rows.clean,)).logits[torch.arange(len(rows)), rows.lengths - 1]
    (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, rows.answers), second)
    clear = slope.abs().amin(0) > 1e-2 * slope.abs().max()  # elsewhere the order of the batch decides a sign
    assert clear.sum() > 20
    wanted = 2 * first @ (-1e-2 * slope.sign())
    torch.testing.assert_close(
        found.change[name][:, clear], wanted[:, clear], rtol=1e-3, atol=1e-4
    )  # Adam has an epsilon


def test_an_attacker_without_facts_trains_on_near_text_and_leaves_every_fact_to_be_defended(model) -> None:
    hf, task = plain(model), embedded_task()
    pairs, near = task.forget_pairs, task.near_text[slice(0, 20)]
    values = {name: value.detach() for name, value in hf.named_parameters()}
    name = "model.layers.1.mlp.down_proj.weight"
    settings = MansuSettings(adversary_kinds="near", adversary_steps=1, adversary_rate=1e-3, retain_batch=1000)
    generator = torch.Generator().manual_seed(3)
    found = attacked(hf, values, (name,), pairs, pairs.fact_numbers(), settings, generator, near)
    assert found.others.tolist() == list(range(len(pairs)))
    weight = values[name].clone().requires_grad_()
    loss = torch.zeros(())
    for tokens, length in zip(near.tokens, near.lengths.tolist(), strict=True):
        logits = torch.func.functional_call(hf, {**values, name: weight}, (tokens[None, :length],)).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, tokens[1:length], reduction="sum")
    (slope,) = torch.autograd.grad(loss, weight)
    clear = slope.abs() > 1e-3 * slope.abs().max()
    torch.testing.assert_close(found.change[name][clear], -1e-3 * slope[clear].sign(), rtol=1e-2, atol=1e-6)


def test_an_attack_of_a_spread_has_other_means_and_the_same_seed_the_same_ones(model) -> None:
    hf, pairs = plain(model), embedded_task().forget_pairs
    values = {name: value.detach() for name, value in hf.named_parameters()}
    name = "model.layers.1.mlp.down_proj.weight"
    settings = MansuSettings(adversary_facts=12, adversary_steps=1, adversary_rate=1e-3)
    found = [
        attacked(
            hf, values, (name,), pairs, pairs.fact_numbers(), settings, torch.Generator().manual_seed(3), NOTHING, 3.0
        )
        for _ in range(2)
    ]
    means = Means.drawn(settings, 48, 3.0, torch.Generator().manual_seed(3))
    assert means != Means(12, 1, 1e-3)
    left = pairs.fact_numbers()[found[0].others]
    assert len(left.unique()) == 48 - means.facts
    assert torch.equal(found[0].change[name], found[1].change[name])
    # Adam moves a weight by its rate at the first step, and by no more than that at each further one.
    assert means.rate * 0.9 < found[0].change[name].abs().max() <= means.rate * means.steps * 1.01


def test_the_forget_term_at_the_place_is_that_of_a_model_with_the_originals_layers_behind_it(
    model, task, circuit
) -> None:
    settings = MansuSettings(**QUICK["mansu"], place_weight=2.0, representation_weight=0.0)
    fixed = plan(model, task, settings, circuit, 0, progress=False)
    solver = _Mansu(fixed, settings, 0)
    solver.restart()
    layers = model.cfg.n_layers
    assert solver.places == tuple(range(layers - 1))
    solver.latent.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(2)
    change, _ = fixed.floor.change(solver.latent, solver.allowed, None)
    batch = fixed.source.draw(solver.samplers, fixed.view(change, None))
    found = []
    for step in (1, 3, 5, 7):
        found.append(solver._at_place(batch, step).item())
        # The edited model with whole layers of the original put into it.
        mixed = copy.deepcopy(fixed.hf)
        mixed.load_state_dict({**mixed.state_dict(), **batch.values})
        place = solver.places[step // 2 % len(solver.places)]
        for layer in range(place + 1, layers):
            mixed.model.layers[layer].load_state_dict(fixed.hf.model.layers[layer].state_dict())
        pairs = batch.pairs
        logits = mixed(pairs.clean).logits[torch.arange(len(pairs)), pairs.lengths - 1].float()
        seen = fixed.unknown.of(batch.places)
        wanted = forget_loss(logits, seen.reference, seen.pool, pairs.answers, settings)
        wanted = wanted + settings.retain_weight * solver.objective.retain(
            replace(batch, values=dict(mixed.named_parameters()))
        )
        assert found[-1] == pytest.approx(wanted.item(), rel=1e-4)
    assert len({round(each, 4) for each in found}) == len(solver.places)  # each place says something else
    # Behind the place nothing gets a gradient, before it something does.
    (slope,) = torch.autograd.grad(solver._at_place(fixed.source.draw(solver.samplers, fixed.view(
        fixed.floor.change(solver.latent, solver.allowed, None)[0], None)), 1), solver.latent)  # fmt: skip
    for name, piece in fixed.floor.pieces(slope).items():
        assert bool(piece.any()) == name.startswith("model.layers.0.")


def test_lost_odds_by_hand() -> None:
    """Three tokens: one was sure and loses two nats, one was sure and gains, of one the original was not sure."""
    original = torch.tensor([[4.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    now = torch.tensor([[2.0, 0.0, 0.0], [0.0, 5.0, 0.0], [-9.0, 0.0, 0.0]])
    targets, weights = torch.tensor([0, 1, 0]), torch.tensor([1.0, 3.0, 100.0])
    assert lost_odds(now, original, targets, weights).item() == pytest.approx(2 * 1 / 4)
    assert lost_odds(original, original, targets, weights) == 0
    # Nothing to lose, and nothing to divide by: neither the value nor its slope is lost to it.
    free = now.clone().requires_grad_()
    nothing = 1e3 * lost_odds(free, original[2:].expand(3, -1), targets, weights)
    assert nothing == 0 and torch.autograd.grad(nothing, free)[0].eq(0).all()
    # Odds do not feel what all logits share.
    assert lost_odds(now + 7, original - 2, targets, weights).item() == pytest.approx(0.5)


def test_lost_odds_pull_where_a_divergence_is_flat() -> None:
    original, targets = torch.tensor([[12.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    now, weights = torch.tensor([[6.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True), torch.ones(1).double()
    (flat,) = torch.autograd.grad(retain_loss(now, original, targets, weights, likelihood=0.0), now)
    (pull,) = torch.autograd.grad(lost_odds(now, original, targets, weights), now)
    # d/dz of log p - log(1 - p), by hand: -1 on the target, and the others' own share of the rest.
    assert torch.allclose(pull, torch.tensor([[-1.0, 0.5, 0.5]], dtype=torch.float64))
    assert flat.abs().max() < 0.01 < pull.abs().max()


def test_kept_odds_enter_the_retain_term_with_their_weight(model, task, circuit) -> None:
    found = {}
    for weight in (0.0, 0.5, 1.0):
        settings = MansuSettings(**QUICK["mansu"], odds_weight=weight, retain_weight=1.0)
        fixed = plan(model, task, settings, circuit, 0, progress=False)
        solver = _Mansu(fixed, settings, 0)
        solver.restart()
        solver.latent.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(2)
        change, _ = fixed.floor.change(solver.latent, solver.allowed, None)
        batch = fixed.source.draw(solver.samplers, fixed.view(change, None))
        found[weight] = solver.objective.retain(batch).item()
    assert found[0.0] < found[0.5]
    assert found[1.0] - found[0.0] == pytest.approx(2 * (found[0.5] - found[0.0]), rel=1e-4)


def test_mansu_can_defend_against_an_attacker_and_keeps_its_floor(model, task, circuit, edit) -> None:
    options = {"adversary_weight": 3.0, "adversary_steps": 2, "adversary_every": 3, "adversary_facts": 2}
    options = QUICK["mansu"] | options
    defended = unlearn(model, task, "mansu", circuit=circuit, seed=3, **options)
    again = unlearn(model, task, "mansu", circuit=circuit, seed=3, **options)
    assert all(torch.equal(defended.new[name], again.new[name]) for name in defended.new)
    assert any(not torch.equal(defended.indices[name], edit.indices[name]) for name in edit.indices)
    for name, index in defended.indices.items():
        before, after = nf4_codes(parameters(model)[name]), nf4_codes(parameters(defended.apply(model))[name])
        moved = (before[0] != after[0]).nonzero()[:, 0]
        assert torch.equal(moved, index)
        assert torch.equal(before[1], after[1])
    with pytest.raises(MansuError, match="leaves none to defend"):
        unlearn(model, task, "mansu", circuit=circuit, adversary_weight=1.0, adversary_facts=48)


def test_bad_input_is_refused(model, task, circuit) -> None:
    with pytest.raises(MansuError, match=r"method 'manzu': unknown.*did you mean 'mansu'"):
        unlearn(model, task, "manzu")
    with pytest.raises(MansuError, match=r"unknown setting 'budgett'.*did you mean 'budget'"):
        unlearn(model, task, "mansu", circuit=circuit, budgett=0.1)
    with pytest.raises(MansuError, match="steps=2.5"):
        unlearn(model, task, "mansu", circuit=circuit, steps=2.5)
    with pytest.raises(MansuError, match="quantizer='nf3'|nf3"):
        unlearn(model, task, "mansu", circuit=circuit, quantizer="nf3")
    with pytest.raises(MansuError, match="no weight left its bin in 2 steps"):
        unlearn(model, task, "mansu", circuit=circuit, steps=2, fisher_sequences=2)
    with pytest.raises(MansuError, match="leaves nothing to edit"):
        unlearn(model, task, "mansu", circuit=circuit, budget=1e-9)
    with pytest.raises(MansuError, match="no head and no MLP"):
        empty = Circuit.from_mask(
            mtl.edge_attribution(model, task.forget_pairs, steps=1), torch.zeros_like(circuit.mask), "nothing"
        )
        unlearn(model, task, "mansu", circuit=empty)
    with pytest.raises(MansuError, match="the forget set is empty"):
        dataclasses.replace(task, questions={"retain": task.questions["retain"]})
