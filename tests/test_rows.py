"""Token tensors as people bring them: what is refused, and that padding reaches no model and no result."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

import mansu_tl as mtl
from mansu_tl.data import PromptPairs, Questions, Sequences, Span, Task
from mansu_tl.data.fit import require_fit
from mansu_tl.errors import MansuError
from mansu_tl.models.limits import most_positions, vocabulary_size
from mansu_tl.runs.metrics import last_logits
from mansu_tl.verification import attack_splits, damage, probe, relearn
from mansu_tl.verification.attacks import answered
from tests.test_attribution import random_pairs
from tests.tiny import FAMILIES, crossed, tiny, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
LENGTHS = torch.tensor([4, 3])


def pairs_of(**changed: object) -> PromptPairs:
    given = {
        "clean": IDS,
        "corrupt": IDS + 20,
        "answers": torch.tensor([13, 14]),
        "distractors": torch.tensor([[15, 16], [17, 18]]),
        "lengths": LENGTHS,
    }
    return PromptPairs.from_tokens(**(given | changed))


def made(kind: type, **fields: object) -> object:
    """An instance as a user makes one: the run's type checker, which would answer first, stays out of it."""
    thing = object.__new__(kind)
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    thing.__dict__.update(defaults | fields)
    thing.__post_init__()
    return thing


def questions_of(**changed: object) -> Questions:
    given = {"prompts": IDS, "lengths": LENGTHS, "options": torch.tensor([[13, 15], [14, 17]]), "facts": ("a", "b")}
    return Questions(**(given | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clean": IDS.bool()}, "prompt pairs: clean holds torch.bool; token ids are whole numbers"),
        ({"clean": IDS.double()}, "prompt pairs: clean holds torch.float64; token ids are whole numbers"),
        ({"clean": IDS.to(torch.complex64)}, "prompt pairs: clean holds torch.complex64"),
        ({"clean": IDS[0]}, r"prompt pairs: clean: shape \(4,\) has 1 dimensions; give 2"),
        ({"answers": torch.tensor([[13], [14]])}, r"prompt pairs: answers: shape \(2, 1\) has 2 dimensions; give 1"),
        ({"answers": torch.tensor(13)}, r"prompt pairs: answers: shape \(\) has 0 dimensions"),
        ({"distractors": torch.ones(2, 0, dtype=torch.long)}, "pairs: no distractor; give each at least one"),
        ({"clean": IDS - 6}, "pair 0: clean has id -1 at position 0; ids count from 0, and padding lies behind"),
        ({"corrupt": IDS - 11}, "pair 0: corrupt has id -6 at position 0"),
        ({"answers": torch.tensor([13, -100])}, "pair 1: option -100 is negative"),
        ({"distractors": torch.tensor([[15, -1], [17, 18]])}, "pair 0: option -1 is negative"),
        ({"answers": torch.tensor([13, 17])}, "pair 1: token 17 is the answer and a distractor"),
        ({"distractors": torch.tensor([[15, 16], [17, 17]])}, "pair 1: token 17 is a distractor twice"),
        ({"lengths": torch.tensor([4, 5])}, r"pair 1: length 5 is outside 1..4, the width of the tokens"),
        ({"lengths": torch.tensor([0, 3])}, r"pair 0: length 0 is outside 1..4"),
        ({"lengths": torch.tensor([-1, 3])}, r"pair 0: length -1 is outside 1..4"),
        ({"lengths": torch.tensor([4])}, "pair lengths: 1 for 2 rows of tokens; give one for each"),
        ({"lengths": torch.tensor([4.0, 3.0])}, "pair lengths holds torch.float32"),
        ({"labels": ["a"]}, "1 labels for 2 pairs"),
        ({"clean": IDS[:0], "corrupt": IDS[:0]}, "none given; pass at least one clean/corrupt pair"),
    ],
)  # fmt: skip
def test_pairs_of_bad_tensors_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(MansuError, match=message):
        pairs_of(**changed)
    given = {"answers": torch.tensor([13, 14]), "distractors": torch.tensor([[15, 16], [17, 18]])} | changed
    answers, distractors = given.pop("answers"), given.pop("distractors")
    if answers.ndim == 1:
        options = torch.cat([answers[:, None], distractors], 1)[..., None]
        with pytest.raises(MansuError, match=message):  # and without from_tokens
            made(PromptPairs, **({"clean": IDS, "corrupt": IDS + 20, "lengths": LENGTHS, "options": options} | given))


def test_answers_of_several_tokens_are_carried_and_checked() -> None:
    texts = ["w3 w4", "w3 w4 w5"], ["w3 w6", "w3 w6 w5"]
    answers, wrong = ["w7 w8", "w9"], [["w7", "w8 w8"], ["w9 w30", "w31"]]
    pairs = PromptPairs.from_text(tiny_tokenizer(), *texts, answers, wrong)
    assert pairs.options.tolist() == [[[7, 8], [7, -1], [8, 8]], [[9, -1], [9, 30], [31, -1]]]
    assert pairs.asked.tolist() == [2, 3] and pairs.chance == pytest.approx(100 / 3)
    assert pairs[[1]].options.tolist() == pairs.options[1:].tolist() and pairs.to("meta").options.shape == (2, 3, 2)
    model = mtl.load(tiny("llama"))
    require_fit(model, pairs)
    with pytest.raises(MansuError, match="answers of up to 2 tokens, and this measures one; choose answers"):
        mtl.runs.logit_difference(mtl.runs.last_logits(model, pairs.clean, pairs.lengths), pairs)
    for options, message in (
        ([[[7, 8], [7, 8]]], r"pair 0: tokens \[7, 8\] is the answer and a distractor"),
        ([[[7, 8], [9, -1], [9, -1]]], "pair 0: token 9 is a distractor twice"),
        ([[[7, 8], [-1, 9]]], "pair 0: option -1 is negative"),
        ([[[7, 8, 9], [9, -1, 9]]], "pair 0: option 9 stands behind the padding; .* -1 only follows"),
    ):
        with pytest.raises(MansuError, match=message):
            PromptPairs(IDS[:1], IDS[:1] + 20, torch.tensor(options), LENGTHS[:1])


def test_a_pairs_fact_is_a_field_and_stays_with_it() -> None:
    pairs = pairs_of(facts=("a / b", "a / b"), labels=["one", "two"])
    assert pairs.facts == ("a / b", "a / b") and pairs.fact_numbers().tolist() == [0, 0]
    assert pairs_of().facts == ("0", "1") and pairs_of()[[1]].facts == ("1",)
    assert Questions.of_pairs(pairs).facts == pairs.facts
    with pytest.raises(MansuError, match="3 facts for 2 pairs; give one for each or none"):
        pairs_of(facts=("a", "b", "c"))


def test_lists_are_told_what_to_pass() -> None:
    message = r"got a list; pass a tensor of token ids \(torch.tensor\(...\)\)"
    with pytest.raises(MansuError, match=f"questions: prompts: {message}"):
        made(Questions, **(vars(questions_of()) | {"prompts": IDS.tolist()}))
    with pytest.raises(MansuError, match=f"sequence lengths: {message}"):
        made(Sequences, tokens=IDS, lengths=[4, 3])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": IDS.float()}, "questions: prompts holds torch.float32"),
        ({"prompts": IDS - 6}, "question 0: prompt has id -1 at position 0"),
        ({"prompts": IDS[0]}, r"questions: prompts: shape \(4,\) has 1 dimensions"),
        ({"options": torch.tensor([[13, 15], [14, 14]])}, "question 1: token 14 is the answer and a distractor"),
        ({"options": torch.tensor([[13, 15, 15], [14, 17, 16]])}, "question 0: token 15 is a distractor twice"),
        ({"options": torch.tensor([[13], [14]])}, "questions: no distractor; give each at least one wrong option"),
        ({"options": torch.ones(2, 0, dtype=torch.long)}, "questions: no distractor"),
        ({"options": torch.tensor([[13, 15]])}, "questions: 1 options for 2 prompts; give one for each"),
        ({"options": torch.tensor([[13, 15], [14, -1]])}, "question 1: option -1 is negative"),
        ({"lengths": torch.tensor([5, 3])}, "question 0: length 5 is outside 1..4"),
        ({"facts": ("a",)}, "questions: 1 facts for 2 prompts"),
        ({"options": torch.tensor([[13, 15], [14, 17]], device="meta")}, "questions: options on meta, prompts on cpu"),
    ],
)
def test_questions_of_bad_tensors_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(MansuError, match=message):
        made(Questions, **(vars(questions_of()) | {"prompts": IDS} | changed))


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (IDS.float(), LENGTHS, "sequences: tokens holds torch.float32"),
        (IDS[None], LENGTHS, r"sequences: tokens: shape \(1, 2, 4\) has 3 dimensions"),
        (IDS - 6, LENGTHS, "sequence 0: text has id -1 at position 0"),
        (IDS, LENGTHS + 1, "sequence 0: length 5 is outside 1..4"),
        (IDS, LENGTHS[:1], "sequence lengths: 1 for 2 rows"),
        (IDS, LENGTHS.to("meta"), "sequence lengths: on meta, the tokens on cpu"),
    ],
)
def test_sequences_of_bad_tensors_are_refused(tokens, lengths, message: str) -> None:
    with pytest.raises(MansuError, match=message):
        made(Sequences, tokens=tokens, lengths=lengths)


def test_spans_of_another_number_are_refused() -> None:
    span = Span("subject", torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(MansuError, match="span 'subject': 1 pieces for 2 pairs"):
        replace(pairs_of(), spans=(span,))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_whole_numbers_of_every_width_are_taken(dtype: torch.dtype) -> None:
    model = mtl.load(tiny("gpt2"))
    pairs = pairs_of(
        clean=IDS.to(dtype), corrupt=(IDS + 20).to(dtype), answers=torch.tensor([13, 14], dtype=dtype),
        distractors=torch.tensor([15, 17], dtype=dtype), lengths=LENGTHS.to(dtype),
    )  # fmt: skip
    assert {getattr(pairs, part).dtype for part in ("clean", "corrupt", "answers", "distractors", "lengths")} == {
        torch.long
    }
    asked = made(Questions, **(vars(questions_of()) | {"prompts": IDS.to(dtype), "lengths": LENGTHS.to(dtype)}))
    assert torch.equal(mtl.accuracy(model, asked).log_odds, mtl.accuracy(model, questions_of()).log_odds)


# Padding -------------------------------------------------------------------------------------------------------------


def filled(tokens: torch.Tensor, lengths: torch.Tensor, value: int) -> torch.Tensor:
    out = tokens.clone()
    out[torch.arange(tokens.shape[1])[None] >= lengths[:, None]] = value
    return out


@pytest.mark.parametrize(("family", "value"), crossed(FAMILIES, [64, -1, -100, 10**9]))
def test_what_stands_in_the_padding_changes_nothing(family: str, value: int) -> None:
    model, pairs = mtl.load(tiny(family)), random_pairs(padded=True)
    # Different padding in clean and corrupt prompts is no difference between them.
    other = PromptPairs.from_tokens(
        filled(pairs.clean, pairs.lengths, value), filled(pairs.corrupt, pairs.lengths, 3), pairs.answers,
        pairs.distractors, pairs.lengths,
    )  # fmt: skip
    a, b = (mtl.edge_attribution(model, p, steps=2, per_position=True) for p in (pairs, other))
    assert torch.equal(a.tensor, b.tensor)
    assert torch.equal(a.per_position, b.per_position)
    a, b = (mtl.activation_patching(model, p) for p in (pairs, other))
    assert torch.equal(a.tensor, b.tensor)
    text, choices = (pairs.clean, pairs.lengths), torch.stack([pairs.answers, pairs.distractors[:, 0]], 1)
    facts = tuple(f"fact {i}" for i in range(len(pairs)))
    asked = [Questions(filled(*text, v), pairs.lengths, choices, facts) for v in (0, value)]
    assert torch.equal(*(mtl.accuracy(model, q).log_odds for q in asked))
    assert torch.equal(*(last_logits(model, filled(*text, v), pairs.lengths) for v in (0, value)))


def test_padding_reaches_no_text_measure_and_no_training() -> None:
    model = mtl.load(tiny("llama"), tokenizer=tiny_tokenizer())
    generator = torch.Generator().manual_seed(0)
    tokens, lengths = (
        torch.randint(3, 64, (12, 6), generator=generator),
        torch.randint(3, 7, (12,), generator=generator),
    )
    choices = torch.stack([torch.randperm(64, generator=generator)[:3] for _ in range(12)])
    results = []
    for value in (0, -100):
        padded = filled(tokens, lengths, value)
        text = Sequences(padded, lengths)
        asked = Questions(padded, lengths, choices, tuple(f"fact {i // 2}" for i in range(12)))
        pairs = PromptPairs.from_tokens(
            padded, filled(tokens.roll(1, 0), lengths, value), choices[:, 0], choices[:, 1:], lengths
        )
        others = replace(asked, facts=tuple(f"other {i // 2}" for i in range(12)))
        task = Task("t", pairs, pairs, text, text, text, {"forget": asked, "retain": others})
        attack = attack_splits(task, 2, 1)[0]
        curve = relearn(model, attack, steps=2)
        audit = damage(model, mtl.quantize(model, "gptq-int4-g64", text), {"x": text}, prompts=text, max_new_tokens=2)
        edit = mtl.unlearn(model, task, "ga-kl", max_steps=3, stop_over_chance=-100.0)
        results.append([
            curve.values, curve.loss, torch.tensor(audit.loss["after"].tolist()), probe(model, asked, folds=2).right,
            mtl.runs.ablation(model, "mean", reference=text).means["stream0"], *edit.new.values(),
        ])  # fmt: skip
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_answers_may_stand_where_padding_stood() -> None:
    sentences = answered(questions_of(prompts=filled(IDS, LENGTHS, -100)))
    assert sentences.tokens.tolist() == [[5, 6, 7, 8, 13], [9, 10, 11, 14, 0]]


def test_a_pad_token_without_an_embedding_gives_the_right_numbers() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 64
    model = mtl.load(tiny("llama"), tokenizer=tokenizer)
    texts = ["w5 w6 w7", "w5 w6 w7 w9"], ["w5 w8 w7", "w5 w8 w7 w9"]
    pairs = PromptPairs.from_text(model, *texts, ["w40", "w41"], ["w42", "w43"])
    together = mtl.edge_attribution(model, pairs, steps=2, per_pair=True).per_pair
    for i in range(2):
        alone = PromptPairs.from_text(model, texts[0][i : i + 1], texts[1][i : i + 1], [f"w{40 + i}"], [f"w{42 + i}"])
        torch.testing.assert_close(mtl.edge_attribution(model, alone, steps=2).tensor, together[i], rtol=0, atol=2e-6)


def test_rows_taken_and_moved_stay_as_they_are() -> None:
    pairs, asked, text = pairs_of(), questions_of(), Sequences(IDS, LENGTHS)
    assert pairs[[1]].clean.tolist() == [[9, 10, 11, 0]]
    assert asked[[1]].prompts.tolist() == text[[1]].tokens.tolist() == [[9, 10, 11, 0]]
    assert pairs[1].lengths.tolist() == asked[1].lengths.tolist() == text[-1].lengths.tolist() == [3]
    assert asked[1].facts == ("b",)
    for thing in (pairs, asked, text):
        assert type(thing.to("meta")) is type(thing)
        assert thing.to("meta").lengths.device.type == "meta"


# Vocabulary and positions --------------------------------------------------------------------------------------------


def long_pairs(width: int) -> PromptPairs:
    clean = torch.randint(3, 60, (2, width), generator=torch.Generator().manual_seed(0))
    corrupt = clean.clone()
    corrupt[:, 2] = 61
    return PromptPairs.from_tokens(
        clean, corrupt, torch.tensor([9, 9]), torch.tensor([10, 10]), torch.tensor([3, width])
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_longer_than_the_model_are_refused_with_both_numbers(family: str) -> None:
    model, pairs = mtl.load(tiny(family)), long_pairs(65)
    message = r"1: 65 tokens, the model has 64 positions; shorten the text"
    asked = Questions(pairs.clean, pairs.lengths, torch.tensor([[9, 10], [9, 10]]), ("a", "b"))
    text = Sequences(pairs.clean, pairs.lengths)
    calls = [
        lambda: mtl.edge_attribution(model, pairs, steps=1),
        lambda: mtl.activation_patching(model, pairs),
        lambda: mtl.patching.node_attribution(model, pairs),
        lambda: mtl.patching.neuron_attribution(model, pairs),
        lambda: mtl.circuit.path_patching(model, pairs, [("embed", "logits")]),
        lambda: mtl.discover_circuit(model, pairs),
        lambda: mtl.accuracy(model, asked),
        lambda: mtl.accuracy(model.original_model, asked),
        lambda: last_logits(model, pairs.clean, pairs.lengths),
        lambda: probe(model, asked, folds=2),
        lambda: damage(model, model, {"x": text}),
        lambda: mtl.quantize(model, "awq-int4-g64", text),
        lambda: mtl.runs.ablation(model, "mean", reference=text),
    ]
    for call in calls:
        with pytest.raises(MansuError, match=message):
            call()
    fits = long_pairs(64)
    assert torch.isfinite(mtl.edge_attribution(model, fits, steps=1).tensor).all()
    assert mtl.accuracy(model, Questions(fits.clean, fits.lengths, asked.choices, ("a", "b"))).log_odds.isfinite().all()


def test_padding_wider_than_the_model_is_cut_or_named() -> None:
    model, pairs = mtl.load(tiny("gpt2")), long_pairs(64)
    wide = (
        torch.nn.functional.pad(pairs.clean, (0, 20), value=-100),
        torch.nn.functional.pad(pairs.corrupt, (0, 20), value=-100),
    )
    cut = PromptPairs.from_tokens(*wide, pairs.answers, pairs.distractors, pairs.lengths)
    assert torch.equal(cut.clean, pairs.clean)
    assert torch.equal(
        mtl.edge_attribution(model, cut, steps=1).tensor, mtl.edge_attribution(model, pairs, steps=1).tensor
    )
    with pytest.raises(
        MansuError, match=r"sequences are padded to 84 tokens.*64 positions.*cut the padding off \(tokens\[:, :64\]\)"
    ):
        last_logits(model, wide[0], pairs.lengths)


def test_a_continuation_that_does_not_fit_is_refused_before_it_is_written() -> None:
    model = mtl.load(tiny("gpt2"), tokenizer=tiny_tokenizer())
    prompt = Sequences(torch.full((1, 60), 5), torch.tensor([60]))
    audit = damage(model, model, {"x": prompt}, prompts=prompt, max_new_tokens=5)
    assert len(audit.generations) == 1
    with pytest.raises(MansuError, match="max_new_tokens=6 behind a prompt of 60 tokens, the model has 64 positions"):
        damage(model, model, {"x": prompt}, prompts=prompt, max_new_tokens=6)


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        (None, 64),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 128),
        ({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "rope_theta": 1e4}, 64),
    ],
)  # fmt: skip
def test_scaled_rotary_embeddings_reach_further(rope, most: int) -> None:
    model = mtl.load(tiny("llama", **({} if rope is None else {"rope_parameters": rope})))
    assert most_positions(model) == most_positions(model.original_model) == most
    require_fit(model, long_pairs(most))
    with pytest.raises(MansuError, match=f"pair 1: {most + 1} tokens, the model has {most} positions"):
        require_fit(model, long_pairs(most + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_beyond_the_vocabulary_are_refused(family: str) -> None:
    model = mtl.load(tiny(family))
    assert vocabulary_size(model) == vocabulary_size(model.original_model) == 64
    message = "1: token 64, the model's vocabulary ends at 63; use its own tokenizer"
    beyond = torch.where(IDS == 11, 64, IDS)
    for pairs in (pairs_of(clean=beyond), pairs_of(corrupt=beyond), pairs_of(answers=torch.tensor([13, 64])),
                  pairs_of(distractors=torch.tensor([15, 64]))):  # fmt: skip
        for call in (mtl.edge_attribution, mtl.activation_patching):
            with pytest.raises(MansuError, match=f"pair {message}"):
                call(model, pairs)
    for asked in (questions_of(prompts=beyond), questions_of(options=torch.tensor([[13, 15], [14, 64]]))):
        for each in (model, model.original_model):
            with pytest.raises(MansuError, match=f"question {message}"):
                mtl.accuracy(each, asked)


def test_every_part_of_a_task_is_held_against_the_model() -> None:
    model, pairs, asked, text = mtl.load(tiny("llama")), pairs_of(), questions_of(), Sequences(IDS, LENGTHS)
    task = Task("t", pairs, pairs, text, text, text, {"forget": asked, "retain": questions_of(facts=("c", "d"))})
    require_fit(model, task)
    beyond = {"clean": torch.where(IDS == 11, 64, IDS)}
    for part, changed, name in (
        ("retain_pairs", replace(pairs, **beyond), "retain_pairs, pair 1: token 64"),
        ("near_text", Sequences(beyond["clean"], LENGTHS), "near_text, sequence 1: token 64"),
        ("unseen", Sequences(torch.ones(1, 65, dtype=torch.long), torch.tensor([65])), "unseen, sequence 0: 65 tokens"),
        ("questions", {**task.questions, "near": questions_of(prompts=beyond["clean"], facts=("e", "f"))},
         "near questions, question 1: token 64"),
    ):  # fmt: skip
        with pytest.raises(MansuError, match=name):
            require_fit(model, replace(task, **{part: changed}))
