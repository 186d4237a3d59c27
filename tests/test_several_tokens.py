"""Answers of several tokens: everything against one token at a time, brute force and finite differences, in every family."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import mansu_tl as mtl
from mansu_tl.circuit import Graph, faithfulness, patch_edges, path_patching
from mansu_tl.data import PromptPairs, Questions, positions
from mansu_tl.data.forced import forced
from mansu_tl.data.text import pad
from mansu_tl.errors import MansuError
from mansu_tl.models.tree import hf_of
from mansu_tl.patching import neuron_attribution, node_attribution
from mansu_tl.runs import answer_log_prob, choice_log_odds, logit_difference
from tests.tiny import FAMILIES, tiny

# Answer, the corrupt prompt's answer, another: of one to three tokens; some begin alike, one is how another one begins.
OPTIONS = [
    [[41, 42, 43], [44, 45], [41, 46]],
    [[47], [48, 49, 50], [51]],
    [[52, 53], [52, 54], [52]],
    [[55], [56], [57, 58]],
]


@cache
def model_of(family: str) -> TransformerBridge:
    return mtl.load(tiny(family))


def several(seed: int = 0, options: list[list[list[int]]] = OPTIONS) -> PromptPairs:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(5, 40, (len(options), 5), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 2] = (clean[:, 2] + 3) % 35 + 5
    widest = max(len(text) for row in options for text in row)
    padded = torch.tensor([[[*text, *[-1] * (widest - len(text))] for text in row] for row in options])
    return PromptPairs(clean, corrupt, padded, torch.tensor([5, 4, 5, 3])[: len(options)])


def one_at_a_time(pairs: PromptPairs, measure: Callable[[PromptPairs], Tensor], options: int = 2) -> Tensor:
    """What is measured of the answer minus what is measured of the corrupt prompt's, one token at a time: [pair, ...].

    The log-probability of a text is the sum of its tokens', each behind those before it, so everything that is linear in
    the metric is the same sum over pairs whose answer is one token. `measure` gives a value for each of these. With one
    option it is the answer's alone.
    """
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    answers, of = [], []
    for i in range(len(pairs)):
        for option in range(options):
            tokens = [token for token in pairs.options[i, option].tolist() if token >= 0]
            for step, token in enumerate(tokens):
                for side, prompts in zip(sides, (pairs.clean, pairs.corrupt), strict=True):
                    side.append([*prompts[i, : pairs.lengths[i]].tolist(), *tokens[:step]])
                answers.append(token)
                of.append((i, 1 - 2 * option))
    (clean, lengths), (corrupt, _) = (pad(side, 0) for side in sides)
    labels = torch.tensor(answers)
    values = measure(PromptPairs.from_tokens(clean, corrupt, labels, (labels + 1) % 60, lengths))
    pair, sign = torch.tensor(of).T
    weighted = values * sign.view(-1, *[1] * (values.ndim - 1))
    return values.new_zeros(len(pairs), *values.shape[1:]).index_add(0, pair, weighted)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_every_text_run_by_itself(family: str) -> None:
    model, pairs = model_of(family), several()
    hf = hf_of(model)
    wanted, greedy = torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool)
    for i in range(4):
        for o, option in enumerate(pairs.options[i]):
            text = torch.cat([pairs.clean[i, : pairs.lengths[i]], option[option >= 0]])
            with torch.no_grad():
                each = hf(text[None]).logits[0].log_softmax(-1)[pairs.lengths[i] - 1 : -1]
            answer = option[option >= 0]
            wanted[i, o] = each.gather(1, answer[:, None]).sum()
            if o == 0:
                greedy[i] = bool((each.argmax(-1) == answer).all())
    per_token = wanted / pairs.option_lengths
    answers = mtl.accuracy(model, Questions.of_pairs(pairs))
    odds = per_token[:, 0] - per_token[:, 1:].logsumexp(1)
    torch.testing.assert_close(answers.log_odds, odds, rtol=0, atol=2e-5)
    assert torch.equal(answers.multiple_choice, per_token[:, 0] > per_token[:, 1:].max(1).values)
    assert torch.equal(answers.cloze, greedy)
    every = torch.ones(1, *Graph.of(model).exists.shape)
    for metric, value in (
        (logit_difference, wanted[:, 0] - wanted[:, 1]), (answer_log_prob, wanted[:, 0]), (choice_log_odds, odds),
    ):  # fmt: skip
        found = patch_edges(model, pairs, every, metric=metric)[0]
        torch.testing.assert_close(found, value, rtol=0, atol=5e-5)


def test_greedy_answers_of_several_tokens_are_right_by_cloze() -> None:
    model = model_of("llama")
    prompts = torch.tensor([[7, 8, 9], [10, 11, 12]])
    with torch.no_grad():
        written = hf_of(model).generate(prompts, max_new_tokens=3, do_sample=False, eos_token_id=None)[:, 3:]
    wrong = written.clone()
    wrong[:, 2] = (written[:, 2] + 1) % 64
    for options, right in ((torch.stack([written, wrong], 1), True), (torch.stack([wrong, written], 1), False)):
        answers = mtl.accuracy(model, Questions(prompts, torch.tensor([3, 3]), options, ("a", "b")))
        assert answers.cloze.tolist() == [right] * 2 and answers.multiple_choice.tolist() == [right] * 2


def test_rows_and_positions_are_shared_where_options_begin_alike() -> None:
    rows = forced(several())
    # Pair 0 asks behind "", 41, 41 42, 44; pair 1 behind "", 48, 48 49; pair 2 behind "", 52; pair 3 behind "", 57.
    assert rows.owner.tolist() == [0, 0, 1, 2, 3] and len(rows.places.rows) == 4 + 3 + 2 + 2
    assert rows.clean[0].tolist() == [*several().clean[0].tolist(), 41, 42]
    assert rows.corrupt[1].tolist() == [*several().corrupt[0].tolist(), 44, 0]
    one = forced(several(), 1)
    assert one.owner.tolist() == [0, 1, 2, 3] and one.lengths.tolist() == [7, 4, 6, 3]
    assert torch.equal(forced(several()[[3]], 2).clean, several()[[3]].clean)  # its first two are one token each
    assert torch.equal(rows[slice(1, 3)].clean, rows.clean[2:4])


@pytest.mark.parametrize("family", FAMILIES)
def test_edge_scores_are_the_sums_over_the_answers_tokens(family: str) -> None:
    model, pairs = model_of(family), several(seed=1)
    for options in ({"method": "eap"}, {"steps": 2}):
        found = mtl.edge_attribution(model, pairs, per_pair=True, batch_size=3, **options)

        def single(pairs: PromptPairs, options: dict[str, object] = options) -> Tensor:
            return mtl.edge_attribution(model, pairs, metric=answer_log_prob, per_pair=True, **options).per_pair

        wanted = one_at_a_time(pairs, single)
        torch.testing.assert_close(found.per_pair, wanted, rtol=0, atol=2e-5 * wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_edge_scores_equal_central_differences_of_exact_patching(family: str) -> None:
    model, pairs, step = model_of(family), several(seed=2), 0.02
    graph = Graph.of(model)
    for metric in (logit_difference, choice_log_odds):
        scores = mtl.edge_attribution(model, pairs, method="eap", metric=metric).tensor
        strongest = scores.abs().flatten().topk(12).indices
        masks = torch.ones(24, *graph.exists.shape)
        for i, place in enumerate(strongest.tolist()):
            for j, sign in enumerate((1, -1)):
                masks[2 * i + j].view(-1)[place] += sign * step
        values = patch_edges(model, pairs, masks, metric=metric).double().mean(1).view(12, 2)
        slopes = (values[:, 0] - values[:, 1]) / (2 * step)
        torch.testing.assert_close(scores.flatten()[strongest].double(), slopes, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_patched_edges_and_paths_are_the_sums_over_the_answers_tokens(family: str) -> None:
    model, pairs = model_of(family), several(seed=3)
    exists = Graph.of(model).exists
    masks = (torch.rand(3, *exists.shape, generator=torch.Generator().manual_seed(0)) < 0.6).float()
    wanted = one_at_a_time(pairs, lambda single: patch_edges(model, single, masks, metric=answer_log_prob).T)
    torch.testing.assert_close(patch_edges(model, pairs, masks).T, wanted, rtol=0, atol=5e-5)
    edges = [("embed", "L1H0.q"), ("L0H1", "logits")]
    for direction in ("noising", "denoising"):
        ours = path_patching(model, pairs, edges, direction=direction)

        def single(pairs: PromptPairs, direction: str = direction) -> Tensor:
            return path_patching(model, pairs, edges, direction=direction, metric=answer_log_prob).per_pair.T

        torch.testing.assert_close(ours.per_pair.T, one_at_a_time(pairs, single), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("family", "component"),
    [
        *(("llama", name) for name in ("resid_pre", "attn_out", "z", "q", "pattern")),
        ("gemma3", "z"),
        ("gemma3", "attn_out"),
    ],
)
def test_sweeps_are_the_sums_over_the_answers_tokens(family: str, component: str) -> None:
    model, pairs = model_of(family), several(seed=4)
    for direction in ("denoising", "noising"):
        options = {"component": component, "direction": direction, "per_pair": True, "cells_per_batch": 5}
        found = mtl.activation_patching(model, pairs, **options)

        def single(pairs: PromptPairs, options: dict[str, object] = options) -> Tensor:
            return mtl.activation_patching(model, pairs, metric=answer_log_prob, **options).per_pair

        torch.testing.assert_close(found.per_pair, one_at_a_time(pairs, single), rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_nodes_and_neurons_are_the_sums_over_the_answers_tokens(family: str) -> None:
    model, pairs = model_of(family), several(seed=5)
    for options in ({"qk_fix": True, "at": "corrupt"}, {"steps": 2}):
        found = node_attribution(model, pairs, per_pair=True, **options)

        def single(pairs: PromptPairs, options: dict[str, object] = options) -> Tensor:
            return node_attribution(model, pairs, metric=answer_log_prob, per_pair=True, **options).per_pair

        torch.testing.assert_close(found.per_pair, one_at_a_time(pairs, single), rtol=1e-4, atol=5e-5)

    def neurons(pairs: PromptPairs) -> Tensor:
        each = [
            neuron_attribution(model, pairs[[i]], signed=True, metric=answer_log_prob).tensor for i in range(len(pairs))
        ]
        return torch.stack(each)

    each = one_at_a_time(pairs, neurons)
    for signed, value in ((True, each.mean(0)), (False, each.abs().mean(0))):
        torch.testing.assert_close(neuron_attribution(model, pairs, signed=signed).tensor, value, rtol=1e-4, atol=5e-5)


def test_scores_by_position_and_pair_add_up_and_name_the_answers_tokens() -> None:
    model, pairs = model_of("llama"), several(seed=6)
    whole = mtl.edge_attribution(model, pairs, per_pair=True)
    for align, names in (
        ("start", [str(i) for i in range(7)]),
        ("end", ["-5", "-4", "-3", "-2", "-1", "+1", "+2"]),
    ):
        found = mtl.edge_attribution(model, pairs, per_position=align, per_pair=True, batch_size=3)
        assert list(found.positions) == names
        torch.testing.assert_close(found.per_position.sum(0), whole.tensor, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.per_pair, whole.per_pair, rtol=0, atol=2e-5)
    assert positions(pairs, "end").index[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    small = mtl.edge_attribution(model, pairs, max_memory="2MB")
    torch.testing.assert_close(small.tensor, whole.tensor, rtol=0, atol=2e-5)


def test_a_sweeps_columns_name_the_prompts_tokens_and_number_the_answers() -> None:
    model, pairs = model_of("llama"), several(seed=6)[[0, 2]]
    sweep = mtl.activation_patching(model, pairs, tokens=list("abcde"))
    assert sweep.columns == ("0 a", "1 b", "2 c", "3 d", "4 e", "5 +1", "6 +2")
    with pytest.raises(MansuError, match="7 tokens for 5 positions; give one for each"):
        mtl.activation_patching(model, pairs, tokens=list("abcdefg"))


def test_integrated_scores_close_the_gap_between_the_ends() -> None:
    model, pairs = model_of("llama"), several(seed=7)
    scores = mtl.edge_attribution(model, pairs, steps="auto", tolerance=0.02)
    gap = scores.metric_clean - scores.metric_corrupt
    assert scores.tensor[0].sum().item() == pytest.approx(gap, rel=0.03)
    circuit = mtl.discover_circuit(model, pairs, faithfulness=0.8, scores=scores)
    assert faithfulness(model, circuit, pairs) == pytest.approx(circuit.faithfulness, abs=1e-4)


def test_a_metric_of_ones_own_is_told_which_positions_it_is_given() -> None:
    model, pairs = model_of("llama"), several()

    def own(logits: Tensor, asked: object) -> Tensor:
        found = asked.log_probs(logits)  # type: ignore[attr-defined]
        return found[:, 0] - found[:, 1]

    ours = mtl.edge_attribution(model, pairs, metric=own)
    torch.testing.assert_close(ours.tensor, mtl.edge_attribution(model, pairs).tensor, rtol=0, atol=2e-5)
    with pytest.raises(MansuError, match="answers of up to 3 tokens"):
        logit_difference(torch.zeros(4, 64), pairs)


def test_answers_that_leave_the_models_positions_are_refused() -> None:
    model = mtl.load(tiny("gpt2", max_position_embeddings=6))
    with pytest.raises(MansuError, match="pair 0: 7 tokens, the model has 6 positions"):
        mtl.edge_attribution(model, several())
