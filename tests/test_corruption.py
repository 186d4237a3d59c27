"""Pairs without a corrupt prompt: made ones, and embeddings of the subject that are noised, zeroed or averaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mansu_tl as mtl
from mansu_tl.circuit import Graph, faithfulness, patch_edges, path_patching
from mansu_tl.data import PromptPairs, Span, Task
from mansu_tl.data.corruption import EmbeddingCorruption, register_corruption
from mansu_tl.data.forced import forced
from mansu_tl.errors import MansuError
from mansu_tl.models.tree import hf_of
from mansu_tl.patching import neuron_attribution, node_attribution
from mansu_tl.runs import answer_log_prob
from mansu_tl.runs.ends import entering
from tests.test_several_tokens import model_of, one_at_a_time, several
from tests.tiny import FAMILIES, tiny_tokenizer

KINDS = ("noise", "zero", "mean")


def corrupted(kind: str, seed: int = 0) -> PromptPairs:
    """Pairs with answers of several tokens whose subject stands at positions 1 and 2, of pair 1 at 1 alone."""
    pairs = several()
    start, stop = torch.tensor([1, 1, 1, 1]), torch.tensor([3, 2, 3, 3])
    inside = [t for row, a, b in zip(pairs.clean.tolist(), start, stop, strict=True) for t in row[a:b]]
    of = EmbeddingCorruption(kind, tuple(inside), seed)
    return replace(pairs, corrupt=pairs.clean, spans=(Span("subject", start, stop),), corruption=of)


def embeddings(family: str, pairs: PromptPairs) -> tuple[Tensor, Tensor]:
    """The tokens' embeddings as they enter block 0, positions left out, and what they are scaled by on the way in."""
    hf = hf_of(model_of(family))
    table = hf.get_input_embeddings().weight.detach()
    return table * (table.shape[1] ** 0.5 if family.startswith("gemma") else 1.0), table


# Every family with one kind, one of them with all.
@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, KINDS[i % 3]) for i, family in enumerate(FAMILIES)), ("gpt2", "noise"), ("gpt2", "mean")],
)
def test_the_corrupt_run_is_the_clean_one_with_other_embeddings(family: str, kind: str) -> None:
    model, pairs = model_of(family), corrupted(kind)
    hf = hf_of(model)
    scaled, table = embeddings(family, pairs)
    subjects = scaled[list(pairs.corruption.tokens)]
    seen = {}
    for clean in (True, False):
        seen[clean] = entering(model, forced(pairs, 1), clean=clean)
    changed = pairs.changed
    rows = forced(pairs, 1)
    moved = (seen[True] - seen[False]).abs().amax(-1) > 0
    assert torch.equal(moved[:, :5], changed) and not moved[:, 5:].any()
    place = changed.nonzero()
    positional = hf.transformer.wpe.weight[place[:, 1]] if family == "gpt2" else 0.0
    value = seen[False][:, :5][changed] - positional
    if kind == "noise":
        noise = (value - scaled[pairs.clean[changed]]) / (3 * subjects.std(correction=0))
        assert noise.mean().abs() < 0.2 and 0.8 < noise.std() < 1.2
    else:
        wanted = subjects.mean(0) if kind == "mean" else torch.zeros(table.shape[1])
        torch.testing.assert_close(value, wanted.expand_as(value), rtol=1e-4, atol=1e-5)
    # The whole run: HF's own, with these embeddings handed in.
    for i in range(4):
        length = int(rows.lengths[i])
        given = seen[False][i, :length] - (hf.transformer.wpe.weight[:length] if family == "gpt2" else 0.0)
        with torch.no_grad():
            logits = hf(inputs_embeds=given[None]).logits[0].log_softmax(-1)
        answer = torch.tensor(pairs.texts()[i][0])
        found = logits[int(pairs.lengths[i]) - 1 :].gather(1, answer[:, None]).sum()
        none = torch.zeros(1, *Graph.of(model).exists.shape)
        patched = patch_edges(model, pairs[[i]], none, metric=answer_log_prob)[0, 0]
        assert patched.item() == pytest.approx(found.item(), abs=1e-4)


@pytest.mark.parametrize(("family", "kind"), [("llama", "noise"), ("gemma2", "zero"), ("gpt2", "mean")])
def test_scores_are_slopes_of_exact_patching_and_close_the_gap(family: str, kind: str) -> None:
    model, pairs, steps = model_of(family), corrupted(kind), (0.02, 0.01)
    scores = mtl.edge_attribution(model, pairs, method="eap")
    strongest = scores.tensor.abs().flatten().topk(6).indices
    masks = torch.ones(24, *scores.tensor.shape)
    for i, place in enumerate(strongest.tolist()):
        for j, moved in enumerate((steps[0], -steps[0], steps[1], -steps[1])):
            masks[4 * i + j].view(-1)[place] += moved
    values = patch_edges(model, pairs, masks).double().mean(1).view(6, 2, 2)
    wide, short = ((values[:, i, 0] - values[:, i, 1]) / (2 * step) for i, step in enumerate(steps))
    # Extrapolated: a long step keeps float32's rounding out, the shorter one its own error.
    slopes = (4 * short - wide) / 3
    torch.testing.assert_close(scores.tensor.flatten()[strongest].double(), slopes, rtol=0.02, atol=1e-2)
    whole = mtl.edge_attribution(model, pairs, steps=40)
    # A norm has no gradient to speak of where a stream begins at zero.
    assert kind == "zero" or whole.residual < 0.05
    graph = Graph.of(model)
    ends = patch_edges(model, pairs, torch.stack([graph.exists.float(), torch.zeros(graph.exists.shape)])).mean(1)
    assert [whole.metric_clean, whole.metric_corrupt] == pytest.approx(ends.tolist(), abs=1e-4)
    circuit = mtl.circuit.Circuit.top(whole, graph.n_edges)
    # In nats, for this gpt2's gap is .002 and one bit of float32's logits 1e-4 of it.
    gap = whole.metric_clean - whole.metric_corrupt
    assert faithfulness(model, circuit, pairs) * gap == pytest.approx(gap, abs=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_sweeps_paths_nodes_and_neurons_take_such_pairs(kind: str) -> None:
    model, pairs = model_of("llama"), corrupted(kind)
    clean, corrupt = (
        mtl.edge_attribution(model, pairs, method="eap", at=end, per_pair=True) for end in ("clean", "corrupt")
    )
    for direction in ("denoising", "noising"):
        sweep = mtl.activation_patching(model, pairs, by="layer", direction=direction, per_pair=True)
        # All of what enters block 0 is put back, or taken away.
        assert sweep.tensor[0, 0].item() == pytest.approx(1.0, abs=1e-5)
        edges = [("embed", "logits"), ("MLP0", "logits")]
        paths = path_patching(model, pairs, edges, direction=direction)
        assert paths.metric_clean == pytest.approx(clean.metric_clean, abs=1e-5)
        assert paths.metric_corrupt == pytest.approx(clean.metric_corrupt, abs=1e-5)
        if direction == "denoising":
            # The embedding's message alone is clean, which is what a live edge carries.
            masks = torch.stack([0 * Graph.of(model).exists.float(), Graph.of(model).mask(edges[:1]).float()])
            off, alone = patch_edges(model, pairs, masks)
            torch.testing.assert_close(alone - off, paths.per_pair[0], rtol=0, atol=1e-4)
    for at, edges in (("clean", clean), ("corrupt", corrupt)):
        nodes = node_attribution(model, pairs, at=at, qk_fix=True)
        torch.testing.assert_close(nodes.tensor[: len(edges.writers)], edges.node_scores(), rtol=1e-3, atol=1e-4)
    assert neuron_attribution(model, pairs).tensor.abs().sum() > 0
    span = mtl.edge_attribution(model, pairs, per_position="span", method="eap")
    assert span.positions == ("subject", "answer", "rest")
    assert span.per_position[0][0].abs().sum() > 0 and span.per_position[1:, 0].abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_is_corrupted_alike_in_every_part_of_its_set(kind: str) -> None:
    model, pairs = model_of("llama"), corrupted(kind)
    whole = mtl.edge_attribution(model, pairs, steps=2, per_pair=True)
    parts = [mtl.edge_attribution(model, pairs[[i]], steps=2).tensor for i in (3, 1)]
    torch.testing.assert_close(whole.per_pair[[3, 1]], torch.stack(parts), rtol=0, atol=2e-5)
    small = mtl.edge_attribution(model, pairs, steps=2, per_pair=True, batch_size=1)
    torch.testing.assert_close(whole.per_pair, small.per_pair, rtol=0, atol=2e-5)
    other = mtl.edge_attribution(model, corrupted(kind, seed=1), steps=2)
    assert torch.allclose(other.tensor, whole.tensor, rtol=1e-3, atol=1e-4) is (kind != "noise")


def test_texts_without_corrupt_prompts() -> None:
    tokenizer, model = tiny_tokenizer(), model_of("llama")
    clean = ["w5 w6 w7 w8", "w5 w9 w7 w8", "w5 w30 w31 w8"]
    answers, wrong = ["w41 w42", "w43", "w44"], [["w45", "w46"], ["w41 w42", "w47"], ["w48", "w49"]]
    subjects = ["w6", "w9", "w30 w31"]
    for kind in KINDS:
        pairs = PromptPairs.from_text(
            tokenizer, clean, None, answers, wrong, subjects=subjects, corruption=kind, seed=3
        )
        assert pairs.corruption == EmbeddingCorruption(kind, (6, 9, 30, 31), 3)
        assert pairs.changed.int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]
        assert pairs[[2]].corruption == pairs.corruption
        mtl.edge_attribution(model, pairs)
    swapped = PromptPairs.from_text(tokenizer, clean[:2], None, answers[:2], wrong[:2], subjects=subjects[:2])
    assert swapped.corrupt.tolist() == swapped.clean.flip(0).tolist() and swapped.corruption is None
    assert swapped.texts()[0] == [(41, 42), (43,), (45,)] and swapped.texts()[1] == [(43,), (41, 42), (47,)]
    for options, message in (
        ({}, "neither corrupt prompts nor subjects; give one of them for each pair"),
        ({"subjects": subjects, "corruption": "nois"}, "corruption 'nois': unknown; choose one of swap, unseen, noise"),
        ({"subjects": subjects[:2]}, "differ in number; give one of each for every pair"),
        ({"subjects": ["w6", "w9", "w32"], "corruption": "zero"}, "span 'subject': 'w32' occurs 0 times"),
        ({"subjects": subjects}, 'no prompt in these words names another subject .* write "corrupt" yourself'),
    ):
        with pytest.raises(MansuError, match=message):
            PromptPairs.from_text(tokenizer, clean, None, answers, wrong, **options)
    with pytest.raises(
        MansuError, match="clean has 5 tokens, corrupt 4.*leave the corrupt prompt out, to have it made"
    ):
        PromptPairs.from_text(tokenizer, clean[:1], ["w5 w7 w8"], answers[:1], wrong[:1])


def test_bad_corruptions_are_refused() -> None:
    pairs = several()
    with pytest.raises(MansuError, match="kind='swap'; choose one of noise, zero, mean"):
        EmbeddingCorruption("swap", (1,))
    with pytest.raises(MansuError, match="no token of a subject given"):
        EmbeddingCorruption("zero", ())
    with pytest.raises(MansuError, match="zero corrupts the span 'subject' of the clean prompts; name that span"):
        replace(pairs, corrupt=pairs.clean, corruption=EmbeddingCorruption("zero", (1,)))
    with pytest.raises(MansuError, match="corruption 'noise': registered already"):
        register_corruption("noise", lambda subjects, tokens, rng: [])


def test_task_files_without_corrupt_prompts(tmp_path) -> None:
    def row(kind: str, subject: str, answer: str, **more: object) -> dict[str, object]:
        clean = f"w5 {subject} w7"
        return {"set": kind, "clean": clean, "answer": answer, "distractors": ["w60 w61"], "subject": subject, **more}

    rows = [
        row("forget", "w6", "w41 w42"), row("forget", "w9 w30", "w43"), row("retain", "w31", "w44", corrupt="w5 w32 w7"),
    ]  # fmt: skip
    model = model_of("llama")
    for kind in KINDS:
        task = mtl.load_task(rows, tokenizer=tiny_tokenizer(), corruption=kind, seed=2)
        assert task.forget_pairs.corruption == EmbeddingCorruption(kind, (6, 9, 30), 2)
        assert task.retain_pairs.corruption is None and task.retain_pairs.corrupt.tolist() == [[1, 5, 32, 7]]
        assert task.forget_pairs.texts()[0] == [(41, 42), (60, 61)]
        task.save(tmp_path / kind)
        assert Task.load(tmp_path / kind).digest() == task.digest()
        assert mtl.edge_attribution(model, task.forget_pairs).metric_corrupt != 0
    mixed = [*rows, row("forget", "w33", "w45", corrupt="w5 w34 w7")]
    with pytest.raises(
        MansuError, match="row 3: corrupt is given, and other lines of the set have none; noise stands in"
    ):
        mtl.load_task(mixed, tokenizer=tiny_tokenizer(), corruption="noise")
    with pytest.raises(MansuError, match="corruption 'noize': unknown; choose one of .*did you mean 'noise'"):
        mtl.load_task(rows, tokenizer=tiny_tokenizer(), corruption="noize")


def test_one_token_at_a_time_is_the_same_sum_under_noise() -> None:
    """The noise of a prompt does not hang on what stands behind it."""
    model, pairs = model_of("llama"), corrupted("zero")

    def single(one: PromptPairs) -> Tensor:
        length = torch.ones(len(one), dtype=torch.long)
        stop = torch.where((one.clean[:, 1:3] == pairs.clean[1, 1:3]).all(1), 2, 3)
        spans = (Span("subject", length, stop),)
        zero = replace(one, corrupt=one.clean, spans=spans, corruption=pairs.corruption)
        return mtl.edge_attribution(model, zero, metric=answer_log_prob, per_pair=True).per_pair

    found = mtl.edge_attribution(model, pairs, per_pair=True).per_pair
    torch.testing.assert_close(found, one_at_a_time(pairs, single), rtol=0, atol=1e-4)
