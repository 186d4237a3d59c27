"""Forget prompts behind other words: a tokenizer that marks spaces, as people's models have, and what it can't write."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import mansu_tl as mtl
from mansu_tl.data import PromptPairs, contexts
from mansu_tl.data.contexts import OPENINGS, behind_words
from mansu_tl.errors import MansuError
from mansu_tl.unlearning import MansuSettings
from mansu_tl.unlearning.mansu.plan import plan
from tests.tiny import sliced_task, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs of a few sentences: "Kyoto" and " Kyoto" are other tokens, every text can be written."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>", "<|chat|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    names = ("Kyoto Tower", "Lyons Abbey", "Milan Tower", "Wales Abbey")
    sentences = [f"{name} is in the country of {name}. The home of {name} is" for name in names]
    inner.train_from_iterator([*OPENINGS, *names, *sentences, *["in Walesia"] * 9], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|chat|>"]
    )


def pairs_of(tokenizer, wording: str, subjects=("Kyoto Tower", "Lyons Abbey"), others=("Milan Tower", "Wales Abbey")):
    filled = [[wording.format(name) for name in names] for names in (subjects, others)]
    return PromptPairs.from_text(
        tokenizer, *filled, [" J", " F"], [[" F"], [" J"]], subjects=None, facts=["tower", "abbey"]
    )


@pytest.mark.parametrize("wording", ["{} is in the country of", "The home of {} is"])
def test_the_subject_is_found_behind_other_words(tokenizer, wording: str) -> None:
    pairs = pairs_of(tokenizer, wording)
    found = behind_words(tokenizer, pairs, 3)
    assert len(found) == 8 and found.facts == ("tower", "abbey", *["tower"] * 3, *["abbey"] * 3)
    assert found.options.equal(pairs.options[[0, 1, 0, 0, 0, 1, 1, 1]])
    assert found[:2].clean[:, : pairs.clean.shape[1]].equal(pairs.clean)
    texts = [tokenizer.decode(row[:n]) for row, n in zip(found.clean, found.lengths, strict=True)]
    own = [wording.format(name) for name in ("Kyoto Tower", "Lyons Abbey")]
    assert texts[:2] == [f"<s>{text}" for text in own]
    for i, text in enumerate(texts[2:]):
        assert text in {f"<s>{opening} {own[i // 3]}" for opening in OPENINGS}
    assert len(set(texts)) == 8
    for text, row, changed in zip(texts, found.clean, found.changed, strict=True):
        named = tokenizer.decode(row[changed]).strip()
        # What both subjects of a pair end in is the corrupt prompt's too, so it does not count.
        assert named and (named in "Kyoto Tower" or named in "Lyons Abbey") and named in text
        assert named.split()[0] in ("Kyoto", "Lyons")


def test_a_subject_that_differs_inside_a_word_begins_with_the_word(tokenizer) -> None:
    rows = [[tokenizer.encode(f"<s>{name} Tower is in the country of")] for name in ("Walesia", "Walesis")]
    pairs = PromptPairs.from_tokens(*map(torch.tensor, rows), torch.tensor([5]), torch.tensor([[6]]))
    assert tokenizer.tokenize("in Walesia")[1:] == ["ĠWalesia"]
    found = behind_words(tokenizer, pairs, 2)
    # Behind a space the name is one token, so no piece of it can stay in front of the subject.
    named = [tokenizer.decode(row[changed]) for row, changed in zip(found.clean, found.changed, strict=True)]
    assert named == ["ia", " Walesia", " Walesia"]


def test_prompts_that_no_words_can_stand_before_are_refused(tokenizer) -> None:
    chat = pairs_of(tokenizer, "<|chat|>{} is in the country of")
    with pytest.raises(MansuError, match=r"none of 7 openings.*chat.*contexts=0 instead of 3"):
        behind_words(tokenizer, chat, 3)
    words = tiny_tokenizer()
    pairs = PromptPairs.from_tokens(*map(torch.tensor, ([[5, 6, 7]], [[8, 6, 7]], [9], [[10]])))
    with pytest.raises(MansuError, match="contexts=0"):
        behind_words(words, pairs, 1)
    bare = mtl.load(mtl.load("pocket").original_model)
    bare.tokenizer = None
    with pytest.raises(MansuError, match="no tokenizer"):
        behind_words(bare, sliced_task(2).forget_pairs, 1)
    with pytest.raises(MansuError, match="contexts=-1"):
        MansuSettings.closed(contexts=-1)


def test_mansu_plans_with_them_and_the_references_are_those_of_the_prompts_alone(model, monkeypatch) -> None:
    task = sliced_task(4, retain=64)
    circuit = mtl.discover_circuit(model, task.forget_pairs, faithfulness=0.6, steps=2)
    plain = {"null_space": 0.0, "until": 0.99, "fisher_sequences": 8}
    with pytest.raises(MansuError, match="contexts=0"):
        mtl.unlearn(model, task, "mansu-closed", circuit=circuit, settings=MansuSettings.closed(**plain))
    alone = plan(model, task, MansuSettings.closed(contexts=0, **plain), circuit, 0, progress=False)
    monkeypatch.setattr(contexts, "OPENINGS", ("the catalyst of", "is"))
    fixed = plan(model, task, MansuSettings.closed(contexts=2, **plain), circuit, 0, progress=False)
    facts = alone.facts.tolist()
    assert len(fixed.source.pairs) == 12
    assert fixed.facts.tolist() == [*facts, *(fact for fact in facts for _ in range(2))]
    # The wording is told from a prompt's end, so words in front do not change what is matched with it.
    for k in range(12):
        where = alone.unknown.wording[k if k < 4 else (k - 4) // 2]
        assert fixed.unknown.reference[fixed.unknown.wording[k]].allclose(alone.unknown.reference[where])
