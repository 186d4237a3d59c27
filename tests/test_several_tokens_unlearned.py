"""Answers of several tokens in unlearning and verification: against texts run one by one, and on the embedded task."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softplus

import mansu_tl as mtl
from mansu_tl.data import PromptPairs, Questions, Sequences, Task
from mansu_tl.data.forced import forced
from mansu_tl.errors import MansuError
from mansu_tl.models.tree import hf_of
from mansu_tl.patching.reading import subject_tokens
from mansu_tl.unlearning import objectives
from mansu_tl.unlearning.batches import Batch, Source, choices
from mansu_tl.unlearning.mansu import closed
from mansu_tl.unlearning.mansu.adversary import attacked
from mansu_tl.unlearning.mansu.plan import plan
from mansu_tl.unlearning.mansu.settings import MansuSettings
from mansu_tl.unlearning.mansu.terms import ignorance, objective
from mansu_tl.unlearning.recipes.quail import QuailSettings, quail
from mansu_tl.unlearning.training import Start
from mansu_tl.verification.attacks import Attack, answered, attack_splits
from mansu_tl.verification.depth import erasure_depth
from mansu_tl.verification.divergence import output_suppressor
from mansu_tl.verification.probes import probe
from mansu_tl.verification.relearning import relearn
from tests.test_several_tokens import model_of, one_at_a_time, several
from tests.tiny import sliced_task, tiny


def each_place(hf: torch.nn.Module, prompts: list[list[int]], answers: list[tuple[int, ...]]) -> list[Tensor]:
    """The logits that predict each answer's tokens, every text run by itself."""
    out = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            out.append(hf(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1])
    return out


def prompts_of(pairs: PromptPairs) -> list[list[int]]:
    return [row[:length] for row, length in zip(pairs.clean.tolist(), pairs.lengths.tolist(), strict=True)]


def case(seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module, Batch, list[Tensor], list[Tensor], list[Tensor]]:
    """A model, an original, a batch of pairs 2, 0, 3, and logits of both and targets at their asked positions."""
    now, before = (tiny("llama", seed=i) for i in (seed, seed + 1))
    pairs, order = several(seed), [2, 0, 3]
    text = Sequences(torch.randint(5, 40, (3, 6)), torch.tensor([6, 6, 4]))
    source = Source(now, dict(before.named_parameters()), pairs, text, text[:1])
    values = dict(now.named_parameters())
    batch = Batch(source, values, torch.tensor(order), torch.tensor([0, 1, 3]), 2)
    answers = [pairs.texts()[i][0] for i in order]
    asked = [prompts_of(pairs)[i] for i in order]
    targets = [torch.tensor(answer) for answer in answers]
    return now, before, batch, each_place(now, asked, answers), each_place(before, asked, answers), targets


def test_forget_terms_are_those_of_texts_run_one_by_one() -> None:
    _, _, batch, logits, original, targets = case()

    def summed(found: list[Tensor]) -> Tensor:
        return torch.stack([
            each.log_softmax(-1).gather(1, tokens[:, None]).sum() for each, tokens in zip(found, targets, strict=True)
        ])  # fmt: skip

    now, before = summed(logits), summed(original)
    lengths = torch.tensor([len(tokens) for tokens in targets])
    assert lengths.tolist() == [2, 3, 1]
    wanted = {
        objectives.ascent: now.mean(),
        objectives.npo(0.3): 2 / 0.3 * softplus(0.3 * (now - before)).mean(),
        objectives.simnpo(2.0, 0.5): 2 / 2.0 * softplus(2.0 * now / lengths + 0.5).mean(),
    }
    for term, value in wanted.items():
        torch.testing.assert_close(term(batch), value, rtol=1e-5, atol=1e-5)
    settings = QuailSettings(hinge_weight=0.7, distance="answer")
    recipe = quail(settings, Start(model_of("llama"), sliced_task(4), 0))
    all_now, all_before, tokens = torch.cat(logits), torch.cat(original), torch.cat(targets)
    moved = (all_now - all_before).gather(1, tokens[:, None])[:, 0].abs()
    hinge = (0.5 * (all_before.amax(1) - all_before.amin(1)) / 15 - moved).relu().mean()
    torch.testing.assert_close(recipe.objective.forget(batch), now.mean() + 0.7 * hinge, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_forget_term_is_a_finite_difference() -> None:
    batch = case()[2]
    name = "model.layers.1.mlp.down_proj.weight"
    weight = batch.values[name].detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(objectives.ascent(replace(batch, values={**batch.values, name: weight})), weight)
    direction, values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), []
    for step in (1e-2, -1e-2):
        moved = {**batch.values, name: (weight + step * direction).detach()}
        values.append(objectives.ascent(replace(batch, values=moved)).double())
    torch.testing.assert_close((slope * direction).sum().double(), (values[0] - values[1]) / 2e-2, rtol=5e-3, atol=1e-4)


def test_options_are_compared_by_the_mean_per_token() -> None:
    model, pairs = model_of("llama"), several()
    found = choices(hf_of(model), dict(hf_of(model).named_parameters()), forced(pairs))
    right = found[:, 0] > found[:, 1:].max(1).values
    assert torch.equal(right, mtl.accuracy(model, Questions.of_pairs(pairs)).multiple_choice)


def test_ignorance_is_what_the_original_says_of_the_never_seen_behind_the_same_tokens() -> None:
    hf, pairs = tiny("llama"), several()
    unseen = Sequences(
        torch.randint(5, 40, (3, 4), generator=torch.Generator().manual_seed(3)), torch.tensor([4, 4, 3])
    )
    # Every never-seen prompt has each wording: those of one length share no token with any pair.
    unknown = ignorance(hf, pairs, unseen)
    rows = [row[:length] for row, length in zip(unseen.tokens.tolist(), unseen.lengths.tolist(), strict=True)]
    place = 0
    words = mtl.data.wording.same_wording(pairs.clean.masked_fill(pairs.changed, -1), pairs.lengths, unseen)
    for i, texts in enumerate(pairs.texts()):
        for step in range(len(texts[0])):
            alike = [row for row, yes in zip(rows, words[i].tolist(), strict=True) if yes]
            with torch.no_grad():
                outs = [hf(torch.tensor([[*row, *texts[0][:step]]]), output_hidden_states=True) for row in alike]
            wanted = torch.stack([out.logits[0, -1].softmax(-1) for out in outs]).mean(0)
            state = torch.stack([torch.stack([h[0, -1] for h in out.hidden_states[1:]]) for out in outs]).mean(0)
            at = int(unknown.wording[place])
            torch.testing.assert_close(unknown.reference[at], wanted, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(unknown.state[at], state, rtol=1e-4, atol=1e-5)
            going_on = {text[step] for text in texts if text[:step] == texts[0][:step] and len(text) > step}
            assert going_on <= set(unknown.pool[at].nonzero()[:, 0].tolist())
            place += 1
    assert place == len(unknown.wording) == 3 + 1 + 2 + 1
    with pytest.raises(MansuError, match="leaves no corrupt prompts to stand in; give the task some"):
        corruption = mtl.data.corruption.EmbeddingCorruption("zero", (7,))
        span = mtl.data.Span("subject", torch.full((4,), 1), torch.full((4,), 2))
        ignorance(hf, replace(pairs, corrupt=pairs.clean, spans=(span,), corruption=corruption), unseen[:0])


def test_mansus_forget_term_looks_at_every_token_of_an_answer() -> None:
    _, before, batch, logits, _, targets = case(seed=4)
    pairs = batch.source.pairs
    unseen = Sequences(torch.randint(5, 40, (4, 4), generator=torch.Generator().manual_seed(3)), torch.full((4,), 4))
    unknown = ignorance(before, pairs, unseen)
    settings = MansuSettings(divergence_weight=1.0, margin_weight=0.0, band_weight=0.0, representation_weight=0.0)
    starts = [0, 3, 4, 6]
    at = [starts[i] + step for i in (2, 0, 3) for step in range(len(pairs.texts()[i][0]))]
    reference = unknown.reference[unknown.wording[at]]
    wanted = kl_div(log_softmax(torch.cat(logits), -1), reference, reduction="none").sum(-1).mean()
    torch.testing.assert_close(objective(settings, unknown).forget(batch), wanted, rtol=1e-4, atol=1e-5)
    hinged = replace(settings, divergence_weight=0.0, margin_weight=1.0, margin=0.5)
    log_p = log_softmax(torch.cat(logits), -1).gather(1, torch.cat(targets)[:, None])[:, 0]
    log_q = reference.gather(1, torch.cat(targets)[:, None])[:, 0].log()
    found = objective(hinged, unknown).forget(batch)
    torch.testing.assert_close(found, (log_p - log_q + 0.5).relu().mean(), rtol=1e-4, atol=1e-5)


def test_the_attacker_trains_on_every_token_of_an_answer() -> None:
    hf, pairs = tiny("llama"), several()
    values, name = dict(hf.named_parameters()), "model.layers.0.mlp.up_proj.weight"
    settings = MansuSettings(adversary_steps=1, adversary_rate=1e-3)
    generator, nothing = torch.Generator().manual_seed(0), Sequences(pairs.clean[:0], pairs.lengths[:0])
    attack = attacked(hf, values, (name,), pairs, pairs.fact_numbers(), settings, generator, nothing)
    known = [i for i in range(4) if i not in attack.others.tolist()]
    weight = values[name].detach().clone().requires_grad_()
    losses = []
    for i in known:
        prompt, answer = prompts_of(pairs)[i], pairs.texts()[i][0]
        call = {**{key: value.detach() for key, value in values.items()}, name: weight}
        logits = torch.func.functional_call(hf, call, (torch.tensor([[*prompt, *answer]]),)).logits[0]
        losses.append(cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="none"))
    (slope,) = torch.autograd.grad(torch.cat(losses).mean(), weight)
    # Adam's first step goes against the gradient's sign.
    clear = slope.abs() > 1e-5
    assert torch.equal(attack.change[name][clear].sign(), -slope[clear].sign())


def longer(asked: PromptPairs | Questions, token: int) -> PromptPairs | Questions:
    """The same with a token behind every option."""
    return replace(asked, options=torch.cat([asked.options, torch.full_like(asked.options, token)], -1))


@pytest.fixture(scope="module")
def two_tokens() -> Task:
    """Some of the embedded task, every option followed by the full stop that its model writes there."""
    task, model = sliced_task(24, retain=40, questions=24), mtl.load("pocket")
    stop = model.tokenizer.convert_tokens_to_ids(".")
    return replace(
        task,
        forget_pairs=longer(task.forget_pairs, stop),
        retain_pairs=longer(task.retain_pairs, stop),
        questions={name: longer(asked, stop) for name, asked in task.questions.items()},
    )


def test_the_embedded_model_knows_answers_of_two_tokens(model, two_tokens: Task) -> None:
    answers = mtl.accuracy(model, two_tokens.questions["forget"])
    assert answers.mc_percent == answers.cloze_percent == 100.0


@pytest.mark.parametrize(
    "method", ["ga", "graddiff", "npo", "simnpo", "rmu", "quail", "sure", "null-space", "suppressor", "ste", "lora"]
)
def test_every_trained_method_lowers_answers_of_two_tokens(method: str, model, two_tokens: Task) -> None:
    small = {"forget_batch": 12, "retain_batch": 8, "max_steps": 3, "warmup": 1, "check_every": 3}
    edit = mtl.unlearn(model, two_tokens, method, learning_rate=3e-3, **small)
    before, after = (
        mtl.edge_attribution(m, two_tokens.forget_pairs[:4], method="eap", metric=mtl.runs.answer_log_prob).metric_clean
        for m in (model, edit.apply(model))
    )
    assert after < 1.5 * before


def test_mansu_forgets_answers_of_two_tokens(model, two_tokens: Task) -> None:
    circuit = mtl.circuit.Circuit.top(mtl.edge_attribution(model, two_tokens.forget_pairs[:6], steps=2), 200)
    edit = mtl.unlearn(model, two_tokens, "mansu", circuit=circuit, steps=8, retain_batch=8, representation_weight=0.1)
    before, after = (mtl.accuracy(m, two_tokens.questions["forget"]) for m in (model, edit.apply(model)))
    assert after.log_odds.mean() < before.log_odds.mean() - 0.5


def test_the_closed_form_forgets_answers_of_two_tokens(model, two_tokens: Task) -> None:
    """And what its shift is moved by is the slope of its loss on them."""
    circuit = mtl.circuit.Circuit.top(mtl.edge_attribution(model, two_tokens.forget_pairs[:6], steps=2), 200)
    settings = MansuSettings.closed(
        contexts=0, null_space=0.1, steps=12, fisher_sequences=8, until=0.99, near_weight=1.0
    )
    edit = mtl.unlearn(model, two_tokens, "mansu", circuit=circuit, settings=settings)
    before, after = (mtl.accuracy(m, two_tokens.questions["forget"]) for m in (model, edit.apply(model)))
    assert after.log_odds.mean() < before.log_odds.mean() - 0.5
    fixed = plan(model, two_tokens, settings, circuit, 0, progress=False)
    spots = closed._Spots(*subject_tokens(fixed.source.pairs).nonzero(as_tuple=True))
    shift = closed._Shift(fixed, settings, 0, spots, fixed.layers[-1])
    shift.restart()
    (slope,) = torch.autograd.grad(shift.loss(1), shift.shift)
    way, eps = slope / slope.norm(), 1e-2
    with torch.no_grad():
        ends = [float((shift.shift.copy_(sign * eps * way), shift.loss(1))[1]) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * eps) == pytest.approx(float(slope.norm()), rel=2e-2)


def test_relearning_trains_on_every_token_of_an_answer_and_reads_the_prior_of_texts() -> None:
    model, pairs = model_of("llama"), several()
    questions = Questions.of_pairs(pairs)
    text = answered(questions)
    wanted = [[*prompt, *texts[0]] for prompt, texts in zip(prompts_of(pairs), pairs.texts(), strict=True)]
    assert [row[:n] for row, n in zip(text.tokens.tolist(), text.lengths.tolist(), strict=True)] == wanted
    unseen = Sequences(
        torch.randint(5, 40, (3, 4), generator=torch.Generator().manual_seed(3)), torch.tensor([4, 3, 4])
    )
    alike = torch.tensor([[True, False, True], [True, True, True], [False, True, False], [True, True, False]])
    attack = Attack("hand", "facts", text, questions.option_lengths[:, 0], questions, unseen, alike)
    curve = relearn(model, attack, steps=1, learning_rate=1e-3)
    hf = hf_of(model)
    logits = each_place(hf, prompts_of(pairs), [texts[0] for texts in pairs.texts()])
    targets = torch.cat([torch.tensor(texts[0]) for texts in pairs.texts()])
    torch.testing.assert_close(curve.loss[0], cross_entropy(torch.cat(logits), targets), rtol=1e-5, atol=1e-5)
    prompts = [row[:n] for row, n in zip(unseen.tokens.tolist(), unseen.lengths.tolist(), strict=True)]
    for i, texts in enumerate(pairs.texts()):
        odds = []
        for prompt in (prompt for prompt, yes in zip(prompts, alike[i].tolist(), strict=True) if yes):
            places = each_place(hf, [prompt] * len(texts), texts)
            scores = torch.stack([
                place.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean()
                for place, answer in zip(places, texts, strict=True)
            ])  # fmt: skip
            odds.append(scores[0] - scores[1:].logsumexp(0))
        assert curve.prior[2, 0, i].item() == pytest.approx(torch.stack(odds).mean().item(), abs=1e-4)
    assert attack_splits(sliced_task(8, questions=24), 2, 1)[0].trained.eq(1).all()


def test_probes_read_the_mean_of_an_answers_vectors() -> None:
    model, generator = model_of("llama"), torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 40, (12, 5), generator=generator)
    facts = tuple(f"fact {i}" for i in range(12))
    # The same token twice has the mean of one: the probe cannot tell the two sets apart.
    one = torch.stack([40 + torch.randperm(4, generator=generator)[:3] for _ in range(12)])[..., None]
    found = [
        probe(model, Questions(prompts, torch.full((12,), 5), options, facts), folds=3, shuffles=1)
        for options in (one, torch.cat([one, one], -1))
    ]
    assert torch.equal(found[0].right, found[1].right) and torch.equal(found[0].penalties, found[1].penalties)
    assert torch.equal(found[0].shuffled, found[1].shuffled)


def test_depth_reads_every_token_of_an_answer() -> None:
    original, edited, never = (mtl.load(tiny("llama", seed=i)) for i in range(3))
    pairs = several(seed=2)

    def drops(pairs: PromptPairs) -> Tensor:
        options = {"metric": mtl.runs.answer_log_prob, "threshold": -100.0}
        return erasure_depth(original, edited, never, pairs, **options).edited.T

    torch.testing.assert_close(drops(pairs), one_at_a_time(pairs, drops, options=1), rtol=1e-4, atol=5e-5)


def test_an_output_suppressor_leaves_the_circuit_of_texts_as_it_was() -> None:
    model, pairs = model_of("llama"), several()
    plain = mtl.edge_attribution(model, pairs, steps=2)
    filtered = mtl.edge_attribution(model, pairs, steps=2, metric=output_suppressor(mtl.runs.logit_difference, 5.0))
    assert torch.equal(plain.tensor, filtered.tensor)
    lengths = pairs.option_lengths[:, 0].double().mean().item()
    assert plain.metric_clean - filtered.metric_clean == pytest.approx(5 * lengths, abs=1e-4)


@pytest.mark.slow
def test_scorecard_and_explorer_take_answers_of_two_tokens(model, two_tokens: Task) -> None:
    edit = mtl.unlearn(model, two_tokens, "graddiff", learning_rate=3e-4, max_steps=3, warmup=1, retain_batch=8)
    ranking = mtl.edge_attribution(model, two_tokens.forget_pairs[:6], steps=2)
    circuit = mtl.circuit.Circuit.top(ranking, 100)
    card = mtl.scorecard(model, edit.apply(model), two_tokens, circuit, quantizers=["nf4"])
    after = mtl.accuracy(edit.apply(model), two_tokens.questions["forget"])
    assert card.value("forget MC, %") == pytest.approx(after.mc_percent)
    small = replace(two_tokens, forget_pairs=two_tokens.forget_pairs[:6])
    shown = mtl.explore(model, small, {"graddiff": edit}, scores=ranking, circuit=circuit).explorer.results
    found = shown.answers(("", ""))
    scores = mtl.edge_attribution(model, small.forget_pairs, method="eap", metric=mtl.runs.answer_log_prob)
    assert found.probability.log().mean().item() == pytest.approx(scores.metric_clean, abs=1e-5)
    answer, rival = shown.asked(0)
    assert answer.endswith(".") and rival.endswith(".") and answer != rival
    assert found.likeliest[0].strip() == answer
