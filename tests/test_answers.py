"""Where an answer meets its prompt: the joint text, and the tokens on either side of the seam."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mansu_tl as mtl
from mansu_tl.data import PromptPairs
from mansu_tl.data.answers import joined, seam
from mansu_tl.data.sources.tofu.files import answer_ids
from mansu_tl.errors import MansuError
from tests.tiny import tiny_tokenizer

WORDS = (
    "Paris",
    "Rome",
    "42",
    "53",
    "17",
    "Q",
    "is",
    "year",
    "the",
    "\u6771\u4eac",
    "\u306f",
    ":",
    "(",
    '"',
    ".",
    "She",
)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2 splits text, whose only merges make whole words, with and without a space in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges: dict[tuple[str, str], None] = {}
    for word in (*WORDS, "\n\n"):
        letters = splitter.pre_tokenize_str(word)[0][0]
        merges |= {(letters[: end - 1], letters[end - 1]): None for end in range(2, len(letters) + 1)}
        merges[("\u0120", letters)] = None
    vocabulary = dict.fromkeys(["<s>", *alphabet, *map("".join, merges)])
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, list(merges)))
    inner.pre_tokenizer = splitter
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>", "[/INST]"]})
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    """Pieces as SentencePiece writes them: a space is part of the word behind it, unknown letters are bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581"]
    pieces += [p for word in WORDS for p in (word, f"\u2581{word}")]
    scores = [(piece, -1.0 if len(piece) > 1 and piece[0] != "<" else -9.0) for piece in pieces]
    inner = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


BYTES, PIECES = byte_level(), sentencepiece()


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("The capital is", "Paris", "The capital is Paris"),
        ("The capital is", " Paris", "The capital is Paris"),
        ("The capital is ", "Paris", "The capital is Paris"),
        ("A:", "Paris", "A: Paris"),
        ("A:\n", "Paris", "A:\nParis"),
        ("A:\n\n", "Paris", "A:\n\nParis"),
        ("A:\t", "Paris", "A:\tParis"),
        ("A:\u00a0", "Paris", "A:\u00a0Paris"),
        ("A:\u3000", "Paris", "A:\u3000Paris"),
        ("A\u2028", "Paris", "A\u2028Paris"),
        # quotes and brackets, open and closed
        ('A:"', "Paris", 'A:"Paris'),
        ('A: "', "Paris", 'A: "Paris'),
        ('He said "no"', "twice", 'He said "no" twice'),
        ('{"answer":"', "Paris", '{"answer":"Paris'),
        ('{"answer": "', "Paris", '{"answer": "Paris'),
        ("x = '", "Paris", "x = 'Paris"),
        ("x='", "Paris", "x='Paris"),
        ("A:'", "Paris", "A:'Paris"),
        ("the dogs'", "tails", "the dogs' tails"),
        ("It isn't", "Paris", "It isn't Paris"),
        ('a screen of 12"', "wide", 'a screen of 12" wide'),
        ("A:`", "Paris", "A:`Paris"),
        ("call `f`", "now", "call `f` now"),
        ("A:(", "Paris", "A:(Paris"),
        ("(see A)", "Paris", "(see A) Paris"),
        ("A:[", "Paris", "A:[Paris"),
        ("A:{", "Paris", "A:{Paris"),
        ("\u201c", "Paris", "\u201cParis"),
        ("\u201cno\u201d", "twice", "\u201cno\u201d twice"),
        ("\u00ab", "Paris", "\u00abParis"),
        ("\u201e", "Paris", "\u201eParis"),
        ("\u300c", "\u6771\u4eac", "\u300c\u6771\u4eac"),
        # chat templates
        ("<|user|>Q<|end|>", "Paris", "<|user|>Q<|end|>Paris"),
        ("<|user|>Q[/INST]", "Paris", "<|user|>Q[/INST]Paris"),
        ("<|im_start|>assistant\n", "Paris", "<|im_start|>assistant\nParis"),
        ("<|unknown_to_it|>", "Paris", "<|unknown_to_it|>Paris"),
        ("<answer>", "Paris", "<answer>Paris"),
        ("a <b>big</b>", "city", "a <b>big</b> city"),
        ("3 >", "2", "3 > 2"),
        # numbers
        ("from the year 1732 to the year 17", "42", "from the year 1732 to the year 1742"),
        ("In the year 17", "Paris", "In the year 17 Paris"),
        ("It costs $", "5", "It costs $5"),
        ("x=", "5", "x=5"),
        ("x =", "5", "x = 5"),
        # scripts without spaces
        ("\u65e5\u672c\u306e\u9996\u90fd\u306f", "\u6771\u4eac", "\u65e5\u672c\u306e\u9996\u90fd\u306f\u6771\u4eac"),
        ("\u6cd5\u56fd\u7684\u9996\u90fd\u662f", "\u5df4\u9ece", "\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u5df4\u9ece"),
        ("\u7b54\u6848\uff1a", "Paris", "\u7b54\u6848\uff1aParis"),
        ("\u0e40\u0e21\u0e37\u0e2d\u0e07", "\u0e44\u0e17\u0e22", "\u0e40\u0e21\u0e37\u0e2d\u0e07\u0e44\u0e17\u0e22"),
        ("\uc218\ub3c4\ub294", "\uc11c\uc6b8", "\uc218\ub3c4\ub294 \uc11c\uc6b8"),
        ("\u0433\u043e\u0440\u043e\u0434", "\u041e\u0448", "\u0433\u043e\u0440\u043e\u0434 \u041e\u0448"),
        # punctuation that closes
        ("It is over", ".", "It is over."),
        ("It is over", "...", "It is over..."),
        ("Is it over", "?", "Is it over?"),
        ("(see A", ")", "(see A)"),
        ('He said "no', '"', 'He said "no"'),
        ("He said", '"', 'He said "'),
        ("Lily", "'s", "Lily's"),
        ("half is", ".5", "half is .5"),
        ("minus", "-5", "minus -5"),
        # glued signs
        ("Jean-", "Paul", "Jean-Paul"),
        ("one -", "two", "one - two"),
        ("and/", "or", "and/or"),
        ("#", "1", "#1"),
        # a word that is an added token is a word
        ("The capital is Zorblax", "Paris", "The capital is Zorblax Paris"),
    ],
)  # fmt: skip
def test_a_space_stands_where_a_writer_puts_one(prompt: str, answer: str, text: str) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["Zorblax"])
    assert joined(tokenizer, prompt, answer) == text
    spaced = prompt + answer if prompt.endswith(" ") or answer.startswith(" ") else f"{prompt} {answer}"
    assert joined(tokenizer, prompt, answer, True) == spaced
    assert joined(tokenizer, prompt, answer, False) == prompt + answer


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte-level", "SentencePiece"])
@pytest.mark.parametrize(
    ("prompt", "answer", "spaced"),
    [
        ("Q is", "Paris", True),
        ("Q is", " Paris", True),
        ("Q is ", "Paris", True),
        ("Q\n", "Paris", False),
        ("Q\n\n", "Paris", False),
        ("Q\n\n\n", "Paris", False),
        ("Q\t", "Paris", False),
        ('Q:"', "Paris", False),
        ("Q:(", "Paris", False),
        ("the year 17", "42", False),
        ("is\u306f", "\u6771\u4eac", False),
        ("She is", ".", False),
    ],
)
def test_the_answer_is_the_token_that_the_joint_text_ends_in(tokenizer, prompt: str, answer: str, spaced: bool) -> None:
    before, new = seam(tokenizer, prompt, answer)
    text = prompt.rstrip(" ") + " " * spaced + answer.strip()
    assert [*before, *new] == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(new).strip() == answer.strip()
    [token] = tokenizer.convert_ids_to_tokens(new)
    assert token.startswith(("\u2581", "\u0120")) is spaced
    # The prompt is what was written, but for white space that went to the answer.
    assert tokenizer.decode(before).rstrip() == prompt.rstrip()


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte-level", "SentencePiece"])
def test_a_space_at_the_prompts_end_goes_to_the_answer(tokenizer) -> None:
    """The boundary moves: "is " and "Paris" are "is" and " Paris", so both spellings are one and the same pair."""
    a = PromptPairs.from_text(tokenizer, ["the Q is "], ["the year is "], ["Paris"], [["Rome", "She"]])
    b = PromptPairs.from_text(tokenizer, ["the Q is"], ["the year is"], [" Paris"], [[" Rome", " She"]])
    for part in ("clean", "corrupt", "lengths", "answers", "distractors"):
        assert torch.equal(getattr(a, part), getattr(b, part)), part
    assert tokenizer.decode(a.clean[0].tolist()).removeprefix("<s>").strip() == "the Q is"


def test_only_one_of_the_prompts_may_end_in_a_space() -> None:
    mixed = PromptPairs.from_text(BYTES, ["the Q is "], ["the year is"], ["Paris"], ["Rome"])
    plain = PromptPairs.from_text(BYTES, ["the Q is"], ["the year is"], ["Paris"], ["Rome"])
    assert torch.equal(mixed.clean, plain.clean)
    assert torch.equal(mixed.corrupt, plain.corrupt)
    with pytest.raises(MansuError, match="pair 0: clean has 4 tokens, corrupt 5"):
        PromptPairs.from_text(BYTES, ["the Q is"], ["the year is\n"], ["Paris"], ["Rome"])
    with pytest.raises(MansuError, match="clean 'the Q is ' and corrupt 'the Q is' are the same tokens"):
        PromptPairs.from_text(BYTES, ["the Q is "], ["the Q is"], ["Paris"], ["Rome"])


def test_spans_end_with_the_prompt_when_its_last_space_goes_to_the_answer() -> None:
    pairs = PromptPairs.from_text(
        BYTES, ["the Q is "], ["the year is "], ["Paris"], ["Rome"], spans={"cue": ["is "], "subject": [("Q", "year")]}
    )
    cue, subject = pairs.spans
    assert (cue.start.tolist(), cue.stop.tolist()) == ([3], [4])
    assert (subject.start.tolist(), subject.stop.tolist()) == ([2], [3])


def test_only_white_space_may_move_to_the_answer() -> None:
    inner = Tokenizer(models.BPE({"1": 0, "2": 1, "12": 2, "a": 3}, [("1", "2")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    with pytest.raises(MansuError, match=r"pair 0: answer '2' joins the end of 'a1' in one token .* set answer_space"):
        PromptPairs.from_text(tokenizer, ["a1"], ["11"], ["2"], ["a"])


def test_answer_space_overrides_for_all_pairs_or_for_each() -> None:
    def tokens(space: object) -> list[str]:
        pairs = PromptPairs.from_text(
            BYTES, ["Q\n", "Q is"], ["She\n", "She is"], ["Paris"] * 2, ["Rome"] * 2, answer_space=space
        )
        return BYTES.convert_ids_to_tokens(pairs.answers.tolist())

    assert tokens("auto") == ["Paris", "\u0120Paris"]
    assert tokens(True) == ["\u0120Paris", "\u0120Paris"]
    assert tokens(False) == ["Paris", "Paris"]
    assert tokens([True, False]) == ["\u0120Paris", "Paris"]
    for wrong in ("yes", None, [True, 1]):
        with pytest.raises(
            (MansuError, TypeError), match=r"answer_space is .*; choose \"auto\", true or false|not iterable"
        ):
            tokens(wrong)
    with pytest.raises(MansuError, match="1 values of answer_space for 2 pairs"):
        tokens([True])


def test_a_task_joins_its_sentences_as_its_pairs(tmp_path: Path) -> None:
    def row(kind: str, clean: str, **extra: object) -> dict[str, object]:
        return {"set": kind, "clean": clean, "corrupt": clean.replace("Q", "She"), "answer": "Paris",
                "distractors": ["Rome"], **extra}  # fmt: skip

    rows = [row("forget", "Q\n"), row("forget", "Q is"), row("retain", "Q:\n"), row("near", "the Q is "),
            row("near", 'Q:"', answer_space=True)]  # fmt: skip
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))

    def words(ids: torch.Tensor) -> list[str]:
        return BYTES.convert_ids_to_tokens(ids.tolist())

    task = mtl.load_task(file, tokenizer=BYTES)
    assert words(task.forget_pairs.answers) == ["Paris", "\u0120Paris"]
    texts = [
        BYTES.decode(row[:n].tolist()) for row, n in zip(task.near_text.tokens, task.near_text.lengths, strict=True)
    ]
    assert texts == ["<s>the Q is Paris", '<s>Q:" Paris']
    assert BYTES.decode(task.retain_text.tokens[0].tolist()) == "<s>Q:\nParis"
    spaced = mtl.load_task(file, tokenizer=BYTES, answer_space=True)
    assert words(spaced.forget_pairs.answers) == ["\u0120Paris", "\u0120Paris"]
    assert BYTES.decode(spaced.retain_text.tokens[0].tolist()) == "<s>Q:\n Paris"
    # What a row says counts more than what the call says.
    glued = mtl.load_task(file, tokenizer=BYTES, answer_space=False)
    assert words(glued.questions["near"].choices[:, 0]) == ["\u0120Paris", "\u0120Paris"]
    with pytest.raises(MansuError, match=r"task: answer_space is 'no'; choose \"auto\", true or false"):
        mtl.load_task(file, tokenizer=BYTES, answer_space="no")


def test_greater_than_prompts_end_inside_a_number() -> None:
    """As EAP-IG's greater-than task has them: "from the year 1732 to the year 17" goes on with "42"."""
    pairs = PromptPairs.from_text(BYTES, ["the year 17"], ["the year 42"], ["53"], ["42"])
    assert BYTES.convert_ids_to_tokens(pairs.answers.tolist()) == ["53"]


def test_tofus_own_text_is_taken_as_it_is_written() -> None:
    for prompt, answer in (("Q:\nA:", "Paris"), ('the "Q is', "Paris"), ("year 17", "42")):
        before, after = answer_ids(BYTES, prompt, answer, end=False)
        assert BYTES.decode([*before, *after]) == f"<s>{prompt} {answer}"


@pytest.mark.parametrize(
    ("answer", "wrong", "message"),
    [
        ("", ["w9"], r"pair 0: answer is blank \(''\)"),
        (" ", ["w9"], r"pair 0: answer is blank \(' '\)"),
        ("w7", [""], "pair 0: distractor is blank"),
        ("w7", [], "pair 0: no distractor; give at least one wrong answer"),
        ("w7", ["w7"], "pair 0: distractor 'w7' and answer 'w7' are the same token 'w7'"),
        ("w7", [" w7"], "pair 0: distractor ' w7' and answer 'w7' are the same token 'w7'"),
        ("w7", ["w9", "w9 "], "pair 0: distractor 'w9 ' and distractor 'w9' are the same token 'w9'"),
        ("Rome", ["w9"], "pair 0: answer 'Rome' is unknown to the tokenizer after 'w3 w4'"),
        (7, ["w9"], "pair 0: answer is 7, not text"),
        ("w7", [None], "pair 0: distractor is None, not text"),
        ("\ud800", ["w9"], "pair 0: answer .* holds half a character"),
    ],
)
def test_answers_that_ask_nothing_are_refused(answer, wrong, message: str) -> None:
    with pytest.raises(MansuError, match=message):
        PromptPairs.from_text(tiny_tokenizer(), ["w3 w4"], ["w3 w5"], [answer], [wrong])


@pytest.mark.parametrize(
    ("clean", "corrupt", "message"),
    [
        ("", "w3", "pair 0: clean is blank"),
        ("w3", "\n", "pair 0: corrupt is blank"),
        ("w3 w4", "w3 w4", "pair 0: clean 'w3 w4' and corrupt 'w3 w4' are the same tokens"),
        ("w3 Rome", "w3 Paris", "pair 0: clean 'w3 Rome' and corrupt 'w3 Paris' are the same tokens"),
    ],
)
def test_prompts_that_contrast_nothing_are_refused(clean: str, corrupt: str, message: str) -> None:
    with pytest.raises(MansuError, match=message):
        PromptPairs.from_text(tiny_tokenizer(), [clean], [corrupt], ["w7"], ["w9"])


def test_a_text_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(MansuError, match="clean is 'w3 w4'; give a list with one entry for each pair"):
        PromptPairs.from_text(tiny_tokenizer(), "w3 w4", ["w3 w5"], ["w7"], ["w9"])


def test_an_answer_of_no_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("*", "")
    for answer, wrong, what in (("**", "w9", "answer"), ("w7", "*", "distractor")):
        message = rf"pair 0: {what} '\*+' continues 'w3' as 0 tokens \[\]; choose an answer that the tokenizer writes"
        with pytest.raises(MansuError, match=message):
            PromptPairs.from_text(tokenizer, ["w3"], ["w4"], [answer], [wrong])
