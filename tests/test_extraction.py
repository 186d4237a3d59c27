"""What is left when a model is sampled, helped, prompted or read early: against enumeration, plain Hugging Face and scipy."""

from __future__ import annotations

import dataclasses
import sys
import zlib
from itertools import combinations
from pathlib import Path

import pytest
import torch
from scipy import stats

import mansu_tl as mtl
from mansu_tl.data import Questions
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint
from mansu_tl.verification import (
    Leakage,
    LogitLens,
    Membership,
    Memorisation,
    SoftPrompt,
    ask_behind,
    hints,
    leak_at_k,
    logit_lens,
    membership,
    memorisation,
    privleak,
    soft_prompt,
)
from mansu_tl.verification.attacks import answered
from mansu_tl.verification.extraction import nucleus
from mansu_tl.verification.hints import KINDS
from mansu_tl.verification.membership import ATTACKS, auc
from tests.tiny import FAMILIES, some, tiny, tiny_tokenizer


def tiny_questions(lengths: tuple[int, ...] = (2, 1, 2, 3), options: int = 3) -> Questions:
    """Questions behind a shared first token, whose answers have so many tokens each; two a fact."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 64, (len(lengths), 5), generator=draw)
    prompts[:, 0] = 1
    words = torch.stack([torch.randperm(60, generator=draw)[:options] + 3 for _ in lengths])
    further = torch.randint(3, 64, (len(lengths), options, max(lengths) - 1), generator=draw)
    texts = torch.cat([words[..., None], further], -1)
    for row, length in enumerate(lengths):
        texts[row, :, length:] = -1
    facts = tuple(f"w: fact {i // 2}" for i in range(len(lengths)))
    return Questions(prompts, torch.tensor([4, 5, 5, 4][: len(lengths)]), texts, facts)


def prompt_of(questions: Questions, row: int) -> list[int]:
    return questions.prompts[row, : int(questions.lengths[row])].tolist()


def next_chances(hf, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        return (hf(torch.tensor([tokens])).logits[0, -1].double() / temperature).softmax(-1)


# leak@k --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [0, 1, 3, 6])
def test_leak_at_k_is_the_share_of_draws_with_a_right_one(right: int) -> None:
    leakage = Leakage("hand", torch.tensor([[right, 0, 6]]), 6, 1.0, 1.0, 0, 0, ("a",))
    marks = [i < right for i in range(6)]
    for k in range(1, 7):
        draws = [any(draw) for draw in combinations(marks, k)]
        assert leakage.at(k).item() == pytest.approx(sum(draws) / len(draws))
        assert leakage.control(k).item() == 0.5
    with pytest.raises(MansuError, match=r"k=7 of 6 samples; choose 1..6"):
        leakage.at(7)


def test_the_nucleus_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    assert nucleus(logits, 1.0)[0].tolist() == pytest.approx([0.1, 0.5, 0.15, 0.25])
    assert nucleus(logits, 0.7)[0].tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert nucleus(logits, 0.4)[0].tolist() == pytest.approx([0, 1, 0, 0])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_answers_are_sampled_as_often_as_the_model_says(temperature: float) -> None:
    hf, questions, n = tiny("llama"), tiny_questions(), 20000
    found = leak_at_k(hf, questions, samples=n, temperature=temperature)
    assert found.hits.equal(leak_at_k(hf, questions, samples=n, temperature=temperature, batch_size=3).hits)
    assert not found.hits.equal(leak_at_k(hf, questions, samples=n, temperature=temperature, seed=1).hits)
    for row, texts in enumerate(questions.texts()):
        for option, text in enumerate(texts):
            chance, told = 1.0, prompt_of(questions, row)
            for token in text:
                chance *= next_chances(hf, told, temperature)[token].item()
                told = [*told, token]
            assert abs(found.hits[row, option].item() - n * chance) <= 5 * (n * chance) ** 0.5 + 5
    assert found.hits.sum() > 20


def test_an_option_may_stand_anywhere_in_a_longer_sample() -> None:
    hf, n = tiny("llama"), 20000
    questions = dataclasses.replace(tiny_questions((1,)), options=torch.tensor([[[5, -1], [5, 6], [7, 7]]]))
    found, told = leak_at_k(hf, questions, samples=n, new_tokens=3), prompt_of(questions, 0)
    words = torch.arange(64)
    with torch.no_grad():
        first = next_chances(hf, told)
        rows = torch.cat([torch.tensor(told).expand(64, -1), words[:, None]], 1)
        second = first[:, None] * hf(rows).logits[:, -1].double().softmax(-1)
        rows = torch.cat([rows.repeat_interleave(64, 0), words.repeat(64)[:, None]], 1)
        third = second.flatten()[:, None] * hf(rows).logits[:, -1].double().softmax(-1)
    every = third.view(64, 64, 64)  # the chance of each sample of three
    a, b, c = words.view(64, 1, 1), words.view(1, 64, 1), words.view(1, 1, 64)
    inside = [(a == 5) | (b == 5) | (c == 5), ((a == 5) & (b == 6)) | ((b == 5) & (c == 6)),
              ((a == 7) & (b == 7)) | ((b == 7) & (c == 7))]  # fmt: skip
    for option, where in enumerate(inside):
        chance = every[where].sum().item()
        assert abs(found.hits[0, option].item() - n * chance) <= 5 * (n * chance) ** 0.5 + 3


def test_at_a_low_temperature_sampling_is_greedy(pocket, never, task) -> None:
    questions = task.questions["forget"][:40]
    for model in (pocket, never):
        found = leak_at_k(model, questions, samples=7, temperature=1e-4)
        assert (found.hits[:, 0] == 7 * mtl.accuracy(model, questions).cloze).all()
    frame = leak_at_k(never, questions, samples=12).to_dataframe()
    assert frame.k.tolist() == [1, 2, 4, 8] and frame.leak.is_monotonic_increasing
    assert ((frame.leak_low <= frame.leak) & (frame.leak <= frame.leak_high)).all()
    assert frame.excess.tolist() == pytest.approx((frame.leak - frame.control).tolist())


def test_sampling_refuses_what_makes_no_sense(pocket, task) -> None:
    questions = task.questions["forget"][:2]
    for wrong in ({"samples": 0}, {"temperature": 0.0}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(MansuError, match=r"leak@k: samples=.*have to be positive"):
            leak_at_k(pocket, questions, **wrong)
    with pytest.raises(MansuError, match="new_tokens=0, the longest option has 1"):
        leak_at_k(pocket, questions, new_tokens=0)
    with pytest.raises(MansuError, match="the question set is empty"):
        leak_at_k(pocket, questions[:0])


# Memorisation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", some(FAMILIES, ("llama", "gpt2")))
@pytest.mark.parametrize("whole", [False, True])
def test_memorisation_is_what_generate_writes_behind_a_prefix(family: str, whole: bool) -> None:
    hf, questions = tiny(family), tiny_questions((3, 2, 1, 3))
    # Answers that the model writes itself, the last one wrong in its middle: all lengths of prefix occur.
    options = questions.options.clone()
    for row, texts in enumerate(questions.texts()):
        told = prompt_of(questions, row)
        for step in range(len(texts[0])):
            token = int(next_chances(hf, told).argmax())
            if row == 3 and step == 1:
                token = (token + 1) % 64
            options[row, 0, step] = token
            told = [*told, token]
    questions = dataclasses.replace(questions, options=options)
    found = memorisation(hf, questions, whole=whole, batch_size=3)
    for row in range(4):
        text = [*prompt_of(questions, row), *questions.texts()[row][0]]
        first = 1 if whole else int(questions.lengths[row])
        hits = [int(next_chances(hf, text[:at]).argmax()) == text[at] for at in range(first, len(text))]
        assert found.exact[row].item() == pytest.approx(sum(hits) / len(hits))
        free = 0  # tokens that greedy decoding adds by itself
        for start in range(len(text) - 1, first - 1, -1):
            out = hf.generate(torch.tensor([text[:start]]), max_new_tokens=len(text) - start, do_sample=False,
                              eos_token_id=None, pad_token_id=0, attention_mask=torch.ones(1, start))  # fmt: skip
            if out[0].tolist() != text:
                break
            free = len(text) - start
        assert found.strength[row].item() == pytest.approx(free / (len(text) - first))
    if not whole:
        assert found.strength.tolist() == pytest.approx([1, 1, 1, found.strength[3].item()])
        assert found.exact[3].item() < 1


def test_of_one_token_both_are_cloze(pocket, never, task, tmp_path: Path) -> None:
    questions = task.questions["forget"][:60]
    for model in (pocket, never):
        found = memorisation(model, questions)
        cloze = mtl.accuracy(model, questions).cloze.float()
        assert found.exact.equal(cloze) and found.strength.equal(cloze)
    sentence = memorisation(pocket, questions, whole=True)
    assert (sentence.tokens == questions.lengths).all()
    assert Memorisation.load(sentence.save(tmp_path / "a.safetensors")).to_dataframe().equals(sentence.to_dataframe())


# Membership ----------------------------------------------------------------------------------------------------------


def test_auc_by_hand_and_by_scipy() -> None:
    assert auc(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.0])) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert auc(torch.ones(3), torch.ones(5)) == 0.5
    draw = torch.Generator().manual_seed(0)
    for n, m in ((7, 4), (30, 50)):
        a, b = (torch.randint(0, 9, (size,), generator=draw).float() + shift for size, shift in ((n, 1.0), (m, 0.0)))
        assert auc(a, b) == pytest.approx(stats.mannwhitneyu(a.numpy(), b.numpy()).statistic / (n * m))


def made_up(members: list[float], others: list[float], label: str = "hand") -> Membership:
    rows = [torch.tensor([values] * len(ATTACKS)) for values in (members, others)]
    facts = [tuple(f"{name} {i}" for i in range(len(values))) for name, values in (("m", members), ("o", others))]
    return Membership(label, rows[0], rows[1], 0.2, facts[0], facts[1])


def test_privleak_by_hand() -> None:
    none = made_up([0.0] * 8, [0.0] * 8)  # AUC .5
    known, gone = made_up([1.0] * 8, [0.0] * 8, "known"), made_up([-1.0] * 8, [0.0] * 8, "gone")
    for model, value, over, known_still in (
        (known, -100, False, True),
        (none, 0, False, False),
        (gone, 100, True, False),
    ):
        found = privleak(model, none)
        assert (found.value, found.over_forgotten, found.remembered) == (value, over, known_still)
    half = made_up([1.0, 1.0, -1.0, -1.0], [0.0] * 4)  # AUC .5, as the reference, but by facts that differ
    low, high = privleak(half, made_up([0.0] * 4, [0.0] * 4)).interval
    assert low < -40 and high > 40
    # MUSE's own form, with the AUC counted from the other side.
    mixed, base = made_up([2.0, 0.5, -1.0], [0.0, 1.0]), made_up([2.0, -1.0, -1.0], [0.0, 1.0])
    theirs = [1 - each.auc("LOSS") for each in (mixed, base)]
    assert privleak(mixed, base, "LOSS").value == pytest.approx(100 * (theirs[0] - theirs[1]) / theirs[1])
    with pytest.raises(MansuError, match="tells every member"):
        privleak(none, known)
    with pytest.raises(MansuError, match="asked about other texts"):
        privleak(none, made_up([0.0] * 3, [0.0] * 8))
    with pytest.raises(MansuError, match="no attack 'luck'"):
        none.auc("luck")


@pytest.mark.parametrize("whole", [True, False])
def test_membership_scores_are_those_of_plain_hugging_face(whole: bool) -> None:
    hf = tiny("llama")
    model = mtl.load(hf, tokenizer=tiny_tokenizer())
    members, others = tiny_questions(), tiny_questions((3, 3))
    found = membership(model, members, others, share=0.5, whole=whole, batch_size=3)
    for asked, scores in ((members, found.members), (others, found.others)):
        for row, texts in enumerate(asked.texts()):
            text = [*prompt_of(asked, row), *texts[0]]
            first, logs, standard = 1 if whole else int(asked.lengths[row]), [], []
            for at in range(first, len(text)):
                each = next_chances(hf, text[:at])
                logs.append(each.log()[text[at]].item())
                mean = (each * each.log()).sum()
                spread = (each * (each.log() - mean) ** 2).sum().sqrt()
                standard.append(((each.log()[text[at]] - mean) / spread).item())
            least = max(1, len(logs) // 2)
            shown = " ".join(f"w{token}" for token in text if token > 2)
            expected = [
                sum(logs) / len(logs), sum(logs) / len(zlib.compress(shown.encode())),
                sum(sorted(logs)[:least]) / least, sum(sorted(standard)[:least]) / least,
            ]  # fmt: skip
            assert scores[:, row].tolist() == pytest.approx(expected, rel=1e-3)


def test_members_are_told_where_they_are_known_and_not_where_they_never_were(pocket, never, task) -> None:
    asked = task.questions["forget"], task.questions["unseen"]
    known, base = (membership(model, *asked, label=name) for model, name in ((pocket, "known"), (never, "never")))
    assert min(known.auc(attack) for attack in ATTACKS) > 0.98
    assert max(abs(base.auc(attack) - 0.5) for attack in ATTACKS) < 0.1
    assert privleak(known, base).remembered
    frame = known.to_dataframe(base)
    assert (frame.privleak < -95).all() and not frame.over_forgotten.any()
    with pytest.raises(MansuError, match="share=0"):
        membership(pocket, *asked, share=0.0)
    with pytest.raises(MansuError, match="no others"):
        membership(pocket, asked[0], asked[1][:0])


# Logit lens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", some(FAMILIES, ("llama", "gemma2", "gpt2")))
def test_the_lens_is_norm_and_head_on_every_layer(family: str) -> None:
    hf, questions = tiny(family), tiny_questions((1, 1, 1, 1))
    model = mtl.load(hf, tokenizer=tiny_tokenizer())
    found = logit_lens(model, questions, batch_size=3)
    inner = hf.get_submodule({"gpt2": "transformer", "gpt_neox": "gpt_neox"}.get(family, "model"))
    norm = inner.get_submodule({"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(family, "norm"))
    for row in range(4):
        streams: list[torch.Tensor] = []
        handle = norm.register_forward_pre_hook(lambda module, inputs, kept=streams: kept.append(inputs[0]))
        with torch.no_grad(), handle:
            states = hf(torch.tensor([prompt_of(questions, row)]), output_hidden_states=True).hidden_states
        for layer, stream in enumerate((*states[:-1], streams[0])):  # Hugging Face gives the last one behind the norm
            logits = hf.get_output_embeddings()(norm(stream[:, -1]))[0].detach()
            if family.startswith("gemma2"):
                cap = hf.config.final_logit_softcapping
                logits = cap * torch.tanh(logits / cap)
            scores = logits[questions.options[row, :, 0]]
            wanted = (scores[0] - scores[1:].logsumexp(0)).item()
            assert found.log_odds[layer, row].item() == pytest.approx(wanted, abs=2e-4)
    assert found.layers == ("embed", "L0", "L1")


def test_the_last_layer_answers_as_the_model_does(pocket, task, tmp_path: Path) -> None:
    model = mtl.load(tiny("llama"), tokenizer=tiny_tokenizer())
    for each, questions in ((pocket, task.questions["forget"][:60]), (model, tiny_questions())):
        found, own = logit_lens(each, questions), mtl.accuracy(each, questions)
        assert found.right[-1].equal(own.multiple_choice) and found.cloze[-1].equal(own.cloze)
        assert torch.allclose(found.log_odds[-1], own.log_odds, atol=1e-4)
    assert LogitLens.load(found.save(tmp_path / "a.safetensors")).layers == found.layers
    with pytest.raises(MansuError, match="the question set is empty"):
        logit_lens(pocket, task.questions["forget"][:0])


# Soft prompt ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", some(FAMILIES, ("llama", "gpt2")))
@pytest.mark.parametrize("shared", [True, False])
def test_a_soft_prompt_of_real_embeddings_is_those_tokens_in_the_prompt(family: str, shared: bool) -> None:
    hf, questions = tiny(family), tiny_questions()
    prompts = questions.prompts.clone()
    if not shared:
        prompts[0, 0] = 2
    questions = dataclasses.replace(questions, prompts=prompts)
    found = soft_prompt(hf, questions, tokens=2, steps=1, batch_size=2)
    words = [[7, 9], [11, 13]]
    real = torch.stack([hf.get_input_embeddings()(torch.tensor(each)).detach() for each in words])
    behind = ask_behind(dataclasses.replace(found, prompts=real), hf, questions, label="told")
    at = 1 if shared else 0
    for fold, tokens in enumerate(words):
        rows = (found.fold == fold).nonzero()[:, 0]
        put = torch.tensor([tokens]).expand(len(rows), -1)
        longer = torch.cat([prompts[rows, :at], put, prompts[rows, at:]], 1)
        asked = questions[rows]
        expected = mtl.accuracy(hf, dataclasses.replace(asked, prompts=longer, lengths=asked.lengths + 2))
        assert torch.allclose(behind.log_odds[rows], expected.log_odds, atol=1e-4)
        assert behind.cloze[rows].equal(expected.cloze)


def test_a_soft_prompt_is_trained_on_other_facts_than_it_is_asked(tmp_path: Path) -> None:
    hf, questions = tiny("llama"), tiny_questions((1, 1, 1, 1))
    before = fingerprint(hf)
    found = soft_prompt(hf, questions, tokens=3, steps=25, batch_size=2, label="it")
    assert fingerprint(hf) == before
    assert (found.loss[:, 1] < found.loss[:, 0]).all()
    assert found.fold[0] == found.fold[1] != found.fold[2] == found.fold[3]  # two questions a fact
    again = soft_prompt(hf, questions, tokens=3, steps=25, batch_size=2, label="it")
    assert again.digest() == found.digest()
    assert SoftPrompt.load(found.save(tmp_path / "a.safetensors")).digest() == found.digest()
    # The answers of a fact enter no prompt that it is asked behind.
    other = questions.options.clone()
    other[found.fold == 0, 0] = 63 - other[found.fold == 0, 0]
    changed = soft_prompt(hf, dataclasses.replace(questions, options=other), tokens=3, steps=25, batch_size=2)
    assert changed.prompts[0].equal(found.prompts[0]) and not changed.prompts[1].equal(found.prompts[1])


def test_a_soft_prompt_refuses_what_makes_no_sense() -> None:
    hf, questions = tiny("llama"), tiny_questions()
    with pytest.raises(MansuError, match=r"folds=3 of 2 facts; choose 2..2"):
        soft_prompt(hf, questions, folds=3)
    for wrong in ({"tokens": 0}, {"steps": 0}, {"learning_rate": 0.0}, {"batch_size": 0}):
        with pytest.raises(MansuError, match="all have to be positive"):
            soft_prompt(hf, questions, **wrong)
    with pytest.raises(MansuError, match="64 positions"):
        soft_prompt(hf, questions, tokens=61)
    found = soft_prompt(hf, questions, tokens=1, steps=1)
    with pytest.raises(MansuError, match="not the questions"):
        ask_behind(found, hf, questions[:2])
    with pytest.raises(MansuError, match="embeddings of 32 numbers, the model's have 64"):
        ask_behind(found, tiny("llama", hidden_size=64), questions)


# Hints ---------------------------------------------------------------------------------------------------------------


class Kept:
    """Stands in for `accuracy`: keeps the questions that were asked, and answers them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Questions] = []

        def accuracy(model, questions):
            self.asked.append(questions)
            return mtl.accuracy(model, questions)

        # The room's function of that name hides the module from a dotted path.
        monkeypatch.setattr(sys.modules["mansu_tl.verification.hints"], "accuracy", accuracy)


def test_hints_say_what_they_say(pocket, task, monkeypatch) -> None:
    kept, tokenizer = Kept(monkeypatch), pocket.tokenizer
    small = dataclasses.replace(task, questions={name: each[:24] for name, each in task.questions.items()})
    found = hints(pocket, small, examples=2, also={"plain again": small.questions["forget"]})
    assert found.left_out == {
        "first letter": "the tokenizer has no letters",
        "first token": "every answer is one token",
    }
    asked = dict(zip(found.answers, kept.asked, strict=True))
    assert list(asked) == [kind for kind in KINDS if kind not in found.left_out] + ["plain again"]
    forget = small.questions["forget"]

    def words(questions: Questions, row: int) -> str:
        return tokenizer.decode(prompt_of(questions, row)).removeprefix("<bos> ")

    def sentences(name: str) -> dict[str, str]:
        source = small.questions[name]
        right = [tokenizer.decode(list(texts[0])) for texts in source.texts()]
        return {f"{words(source, row)} {answer}": source.facts[row] for row, answer in enumerate(right)}

    for row, fact in enumerate(forget.facts):
        question = words(forget, row)
        for source in ("near", "forget"):
            first, second, last = words(asked[f"examples, {source} facts"], row).split(" . ")
            told = {sentences(source)[first], sentences(source)[second]}
            assert last == question and len(told - {fact}) == 2
            assert all(each.split(":")[0] == fact.split(":")[0] for each in told)
        listed, last = words(asked["options named"], row).split(" . ")
        assert last == question
        assert set(listed.split(" , ")) == {tokenizer.decode(list(text)) for text in forget.texts()[row]}
        # Pocket knows everything: what it writes behind the first question is the right answer.
        before, last = words(asked["combined, forget"], row).split(" . ")
        assert last == question and before in sentences("retain")
        before, last = words(asked["combined, retain"], row).split(" . ")
        assert last == words(small.questions["retain"], row) and before in sentences("forget")
    assert asked["combined, retain"].facts == small.questions["retain"].facts
    assert asked["other wordings"] is small.questions["forget_paraphrase"]
    assert found.answers["plain"].mc_percent == found.answers["plain again"].mc_percent == 100
    frame = found.to_dataframe()
    assert (frame.chance == 25).all() and frame.hint.tolist() == list(asked)
    places = set()
    for row, texts in enumerate(forget.texts()):
        listed = words(asked["options named"], row).split(" . ")[0].split(" , ")
        places.add(listed.index(tokenizer.decode(list(texts[0]))))
    assert len(places) > 1  # the right one stands anywhere


def test_the_first_token_of_a_longer_answer_is_told_and_the_rest_is_asked(task, monkeypatch) -> None:
    from tests.road import tiny_task

    kept, model = Kept(monkeypatch), mtl.load(tiny("llama"), tokenizer=tiny_tokenizer())
    small, forget = tiny_task(), tiny_task().questions["forget"]
    behind = torch.where(torch.arange(4) == 3, -1, 9).view(1, 4, 1).expand(len(forget), -1, -1).clone()
    behind[0] = -1  # the first answer is one token
    behind[1:, 1] = 10
    options = torch.cat([forget.options, behind], -1)
    questions = {**small.questions, "forget": dataclasses.replace(forget, options=options)}
    found = hints(model, dataclasses.replace(small, questions=questions), separator="w8", kinds=("first token",))
    told = kept.asked[1]
    assert told.facts == forget.facts[1:] and set(found.answers) == {"plain", "first token"}
    for row in range(len(told)):
        first = [text[0] for text in questions["forget"].texts()[row + 1]]
        assert prompt_of(told, row) == [*prompt_of(forget, row + 1), first[0]]
        # The rest of the answer, of a distractor that differs from it, and whole ones that would be equal or empty.
        assert told.texts()[row] == [(9,), (10,), (first[2], 9), (first[3],)]


def test_hints_refuse_what_makes_no_sense(pocket, task) -> None:
    with pytest.raises(MansuError, match="no kind 'luck'"):
        hints(pocket, task, kinds=("luck",))
    with pytest.raises(MansuError, match="examples=0"):
        hints(pocket, task, examples=0)
    with pytest.raises(MansuError, match="does not know the separator '§'"):
        hints(pocket, task, separator="§")
    bare = dataclasses.replace(
        task, questions={k: v[:4] for k, v in task.questions.items() if k in ("forget", "retain")}
    )
    found = hints(pocket, bare, kinds=("other wordings", "examples, near facts", "examples, forget facts"))
    assert list(found.answers) == ["plain"]
    assert found.left_out["other wordings"] == "the task has no questions in other wordings"
    assert found.left_out["examples, near facts"] == "the task asks no near questions"
    assert "only 0 other forget facts" in found.left_out["examples, forget facts"]


def test_answered_prompts_are_what_is_scored() -> None:
    """What membership and memorisation look at is the prompt with its right answer, no more."""
    questions = tiny_questions()
    text = answered(questions)
    for row, texts in enumerate(questions.texts()):
        assert text.tokens[row, : int(text.lengths[row])].tolist() == [*prompt_of(questions, row), *texts[0]]
