"""Pairs of real text: padding on either side, BOS by family, spans, positions from either end."""

from __future__ import annotations

import pytest
import torch

import mansu_tl as mtl
from mansu_tl.data import PromptPairs, positions
from mansu_tl.data.text import encode
from mansu_tl.errors import MansuError
from mansu_tl.runs.passes import run
from tests.test_attribution import random_pairs
from tests.tiny import FAMILIES, tiny, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def left_padded(pairs: PromptPairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = pairs.clean.shape[1]
    clean, corrupt, mask = (torch.zeros_like(pairs.clean) for _ in range(3))
    for i, length in enumerate(pairs.lengths.tolist()):
        clean[i, width - length :] = pairs.clean[i, :length]
        corrupt[i, width - length :] = pairs.corrupt[i, :length]
        mask[i, width - length :] = 1
    return clean, corrupt, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_pairs_give_what_the_bridge_computes_on_them(family: str) -> None:
    model, pairs = mtl.load(tiny(family)), random_pairs(padded=True)
    clean, corrupt, mask = left_padded(pairs)
    ours = PromptPairs.from_tokens(clean, corrupt, pairs.answers, pairs.distractors, attention_mask=mask)
    assert torch.equal(ours.lengths, pairs.lengths)
    with torch.no_grad():
        # Position ids from the mask, as generation makes them: each prompt begins at position 0.
        ids = (mask.cumsum(1) - 1).clamp(min=0)
        direct = model.original_model(clean, attention_mask=mask, position_ids=ids).logits[:, -1].float()
        torch.testing.assert_close(run(model, ours.clean, ours.lengths), direct, rtol=0, atol=2e-5)
    a, b = mtl.edge_attribution(model, ours), mtl.edge_attribution(model, pairs)
    torch.testing.assert_close(a.tensor, b.tensor, rtol=0, atol=2e-6)


def test_right_padding_by_mask_equals_right_padding_by_lengths() -> None:
    pairs = random_pairs(padded=True)
    mask = (torch.arange(7)[None] < pairs.lengths[:, None]).long()
    ours = PromptPairs.from_tokens(pairs.clean, pairs.corrupt, pairs.answers, pairs.distractors, attention_mask=mask)
    for i, length in enumerate(pairs.lengths.tolist()):
        assert torch.equal(ours.clean[i, :length], pairs.clean[i, :length])
    assert ours.clean.shape[1] == int(pairs.lengths.max())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1], [1, 1, 1]], "pair 0: the clean mask has holes"),
        ([[1, 1, 1], [0, 0, 0]], "pair 1: the clean mask has no real token"),
        ([[1, 1], [1, 1]], r"clean mask: shape \(2, 2\), the tokens have \(2, 3\)"),
    ],
)
def test_bad_masks_are_refused(mask: list[list[int]], message: str) -> None:
    tokens, answers = torch.arange(6).reshape(2, 3), torch.tensor([1, 2])
    with pytest.raises(MansuError, match=message):
        PromptPairs.from_tokens(tokens, tokens, answers, answers, attention_mask=torch.tensor(mask))


def test_tensors_that_do_not_fit_each_other_are_refused() -> None:
    tokens, answers = torch.arange(6).reshape(2, 3), torch.tensor([1, 2])
    ones = torch.ones_like(tokens)
    with pytest.raises(MansuError, match="both lengths and attention_mask"):
        PromptPairs.from_tokens(tokens, tokens, answers, answers, torch.tensor([3, 3]), attention_mask=ones)
    shorter = torch.tensor([[1, 1, 1], [0, 1, 1]])
    with pytest.raises(MansuError, match=r"pair 1: clean has 3 tokens, corrupt 2: \[3, 4, 5\] against \[4, 5\]"):
        PromptPairs.from_tokens(tokens, tokens, answers, answers, attention_mask=ones, corrupt_mask=shorter)
    with pytest.raises(MansuError, match="corrupt_mask without attention_mask"):
        PromptPairs.from_tokens(tokens, tokens, answers, answers, corrupt_mask=shorter)
    with pytest.raises(MansuError, match=r"clean is \(2, 3\), corrupt \(2, 2\)"):
        PromptPairs.from_tokens(tokens, tokens[:, :2], answers, answers)
    with pytest.raises(MansuError, match="1 answers for 2 pairs"):
        PromptPairs.from_tokens(tokens, tokens, answers[:1], answers)
    with pytest.raises(MansuError, match="clean holds torch.float32"):
        PromptPairs.from_tokens(tokens.float(), tokens, answers, answers)
    with pytest.raises(MansuError, match="answers is on meta, clean on cpu"):
        PromptPairs.from_tokens(tokens, tokens, answers.to("meta"), answers)


@pytest.mark.parametrize(("family", "bos"), [(f, f not in ("qwen3", "gpt_neox")) for f in FAMILIES])
def test_bos_is_what_the_family_does(family: str, bos: bool) -> None:
    model = mtl.load(tiny(family), tokenizer=TOKENIZER)
    assert encode(model, "w5 w6") == ([1, 5, 6] if bos else [5, 6])
    assert encode(model, "w5 w6", not bos) == ([5, 6] if bos else [1, 5, 6])
    pairs = PromptPairs.from_text(model, ["w5 w6"], ["w7 w6"], ["w8"], ["w9"])
    assert pairs.clean.tolist() == [[1, 5, 6] if bos else [5, 6]]


def test_a_text_that_brings_its_own_bos_gets_no_second_one() -> None:
    assert encode(TOKENIZER, "w1 w5") == [1, 5]


def test_pairs_of_different_token_length_are_shown_side_by_side() -> None:
    lists = r"\['w1', 'w3', 'w4', 'w5'\] against \['w1', 'w3', 'w6'\]"
    message = rf"pair 0: clean has 4 tokens, corrupt 3: {lists} \(they part at position 2\)"
    with pytest.raises(MansuError, match=message):
        PromptPairs.from_text(TOKENIZER, ["w3 w4 w5"], ["w3 w6"], ["w7"], ["w8"])


def with_spans() -> PromptPairs:
    return PromptPairs.from_text(
        TOKENIZER,
        ["w9 w31 w32 w50", "w33 w34 w51"],
        ["w9 w41 w42 w50", "w43 w44 w51"],
        ["w7", "w8"],
        ["w8", "w7"],
        spans={"subject": [("w31 w32", "w41 w42"), ("w33 w34", "w43 w44")], "cue": ["w50", "w51"]},
    )


def test_spans_are_found_in_the_text_and_stay_with_the_pairs() -> None:
    pairs = with_spans()
    subject, cue = pairs.spans
    assert (subject.start.tolist(), subject.stop.tolist()) == ([2, 1], [4, 3])
    assert (cue.start.tolist(), cue.stop.tolist()) == ([4, 3], [5, 4])
    assert pairs[[1]].spans[0].start.tolist() == [1]
    assert pairs.to("cpu").spans[1].name == "cue"
    where = positions(pairs, "span")
    assert where.names == ("subject", "cue", "rest")
    assert where.index.tolist() == [[2, 2, 0, 0, 1], [2, 0, 0, 1, -1]]


def test_scores_over_spans_are_sums_of_scores_over_their_positions() -> None:
    model, pairs = mtl.load(tiny("llama")), with_spans()
    spans = mtl.edge_attribution(model, pairs, per_position="span")
    expected = torch.zeros_like(spans.per_position)
    index = positions(pairs, "span").index
    for i in range(len(pairs)):
        alone = mtl.edge_attribution(model, pairs[i : i + 1], per_position=True).per_position
        for position, row in enumerate(index[i].tolist()):
            if row >= 0:
                expected[row] += alone[position] / len(pairs)
    assert spans.positions == ("subject", "cue", "rest")
    torch.testing.assert_close(spans.per_position, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"a": ["w9"]}, r"pair 0: span 'a': 'w9' occurs 0 times"),
        ({"a": ["w3"]}, r"pair 0: span 'a': 'w3' occurs 2 times"),
        ({"a": [("w4", "w3 w6")]}, r"pair 0: span 'a' covers tokens 1..1 of clean \('w4'\) and 0..1 of corrupt"),
        ({"a": ["w4", "w4"]}, "span 'a': 2 pieces for 1 pairs"),
    ],
)
def test_bad_spans_are_refused(spans: dict[str, list[object]], message: str) -> None:
    with pytest.raises(MansuError, match=message):
        PromptPairs.from_text(TOKENIZER, ["w3 w4 w3"], ["w3 w6 w5"], ["w7"], ["w8"], spans=spans)


def test_positions_that_make_no_sense_are_refused() -> None:
    with pytest.raises(MansuError, match="unknown alignment 'middle'"):
        positions(random_pairs(), "middle")
    with pytest.raises(MansuError, match="the pairs have no spans"):
        positions(random_pairs(), "span")
    overlapping = PromptPairs.from_text(
        TOKENIZER, ["w3 w4 w5"], ["w3 w6 w5"], ["w7"], ["w8"], spans={"a": [("w4", "w6")], "b": [("w4 w5", "w6 w5")]}
    )
    with pytest.raises(MansuError, match="pair 0: spans 'a' and 'b' share position 2"):
        positions(overlapping, "span")


def test_wordings_of_one_fact_share_its_number() -> None:
    pairs = PromptPairs.from_text(
        TOKENIZER,
        ["w3", "w4", "w5"],
        ["w4", "w5", "w3"],
        ["w7"] * 3,
        ["w8"] * 3,
        facts=["b", "a", "b"],
    )
    assert pairs.facts == ("b", "a", "b")
    assert pairs[1:].facts == ("a", "b")
    assert pairs.fact_numbers().tolist() == [0, 1, 0]
