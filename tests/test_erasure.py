"""Evidence of structural erasure against hand computation, plain Hugging Face and models whose answer is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.data import Questions, Sequences
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint, parameters, plain, rebuild
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.runs.metrics import accuracy, answer_log_prob
from mansu_tl.verification import (
    Attack,
    Damage,
    ErasureDepth,
    Probes,
    Rediscovery,
    Relearning,
    RelearningCurve,
    attack_splits,
    compare_relearning,
    damage,
    erasure_depth,
    probe,
    rediscover,
    relearn,
    unrelated_attack,
)
from mansu_tl.verification.attacks import answered
from mansu_tl.verification.probes import ridge, streams
from tests.test_attribution import random_pairs
from tests.tiny import FAMILIES, tiny, tiny_tokenizer

_BLOCKS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # rows that 4-bit blocks fit


@pytest.fixture(scope="module")
def suppressed(pocket, task):
    """Pocket with the forget answers pushed down by its last MLP alone; nothing before it has changed."""
    hf, name = plain(pocket), "model.layers.3.mlp.down_proj.weight"
    weight = dict(hf.named_parameters())[name].requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=2e-3)
    asked = task.questions["forget"]
    for _ in range(80):
        logits = hf(asked.prompts).logits[torch.arange(192), asked.lengths - 1]
        gap = logits.gather(1, asked.choices[:, :1])[:, 0] - logits.gather(1, asked.choices[:, 1:]).amax(1)
        if (gap > 0).float().mean() < 0.2:
            break
        optimizer.zero_grad()
        (gap + 1).relu().mean().backward()
        optimizer.step()
    return rebuild(pocket, {name: weight.detach()})


def tiny_questions(n: int = 12, seed: int = 0) -> Questions:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, 64, (n, 7), generator=generator)
    lengths = torch.randint(4, 8, (n,), generator=generator)
    choices = torch.stack([torch.randperm(64, generator=generator)[:3] for _ in range(n)])
    return Questions(prompts, lengths, choices, tuple(f"fact {i // 2}" for i in range(n)))


def tiny_attack(n: int = 12) -> Attack:
    questions = tiny_questions(n)
    unseen = Sequences(questions.prompts[:3], questions.lengths[:3])
    return Attack(
        "hand",
        "facts",
        answered(questions),
        torch.ones(n, dtype=torch.long),
        questions,
        unseen,
        torch.ones(n, 3, dtype=torch.bool),
    )


# Attacks -------------------------------------------------------------------------------------------------------------


def test_attacks_train_on_some_facts_and_ask_about_the_others(task, pocket) -> None:
    attacks = attack_splits(task, 12, 3, seed=4)
    sentences = {}
    for question, prompt, length, choice in zip(
        task.questions["forget"].facts, *(getattr(task.questions["forget"], k) for k in ("prompts", "lengths", "choices")),
        strict=True,
    ):  # fmt: skip
        sentences[(*prompt[:length].tolist(), choice[0].item())] = question
    trained = []
    for attack in attacks:
        rows = [tuple(r[:n].tolist()) for r, n in zip(attack.text.tokens, attack.text.lengths, strict=True)]
        trained.append({sentences[row] for row in rows})
        assert len(rows) == 48 and len(trained[-1]) == 12
        assert len(set(attack.questions.facts)) == 36 and not trained[-1] & set(attack.questions.facts)
    assert not trained[0] & trained[1] and not trained[1] & trained[2]
    again = attack_splits(task, 12, 3, seed=4)
    assert all(a.text.tokens.equal(b.text.tokens) for a, b in zip(attacks, again, strict=True))
    assert not attack_splits(task, seed=5)[0].text.tokens.equal(attacks[0].text.tokens)
    assert all(len(set(a.questions.facts)) == 48 - 40 for a in attack_splits(task, 40, 3))  # more than there are facts
    other = unrelated_attack(task, questions="forget_paraphrase")
    assert (other.kind, len(other.text), len(other.questions)) == ("text", 1024, 48)


def test_the_prior_is_read_in_the_questions_own_words(task, pocket) -> None:
    attack = attack_splits(task, splits=1, questions="forget_paraphrase")[0]

    def words(tokens: torch.Tensor, length: torch.Tensor) -> str:
        return pocket.tokenizer.decode(tokens[:length])

    seen = {words(t, n) for t, n in zip(task.unseen.tokens, task.unseen.lengths, strict=True)}
    asked = [words(t, n) for t, n in zip(attack.questions.prompts, attack.questions.lengths, strict=True)]
    unseen = [words(t, n) for t, n in zip(attack.unseen.tokens, attack.unseen.lengths, strict=True)]
    assert not seen & set(unseen)  # names kept for evaluation
    for prompt, fact, alike in zip(asked, attack.questions.facts, attack.alike, strict=True):
        before, after = prompt.split(fact.split(":")[1])
        wanted = [u.startswith(before) and u.endswith(after) for u in unseen]
        assert alike.tolist() == wanted and any(wanted)


def test_attacks_refuse_what_makes_no_sense(task) -> None:
    for k in (0, 48):
        with pytest.raises(MansuError, match=rf"k={k} facts .* choose 1..47"):
            attack_splits(task, k)
    with pytest.raises(MansuError, match="splits=0"):
        attack_splits(task, 12, 0)
    with pytest.raises(MansuError, match="no question set 'luck'"):
        unrelated_attack(task, questions="luck")


# Relearning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers_only", [True, False])
def test_relearning_is_plain_fine_tuning(answers_only: bool) -> None:
    attack = tiny_attack()
    if not answers_only:
        attack = dataclasses.replace(attack, trained=attack.text.lengths - 1)
    hf = tiny("llama")
    before = fingerprint(hf)
    curve = relearn(hf, attack, steps=4, learning_rate=1e-2, batch_size=12, weight_decay=0.1, ask_at=range(5))
    assert fingerprint(hf) == before
    text = attack.text
    position = torch.arange(text.tokens.shape[1])[None]
    wanted = position == text.lengths[:, None] - 1 if answers_only else position < text.lengths[:, None]
    labels = torch.where(wanted, text.tokens, -100)
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(5):
        loss = model(text.tokens, labels=labels).loss
        assert curve.loss[step].item() == pytest.approx(loss.item(), rel=1e-4)
        expected = accuracy(model, attack.questions)
        assert torch.allclose(curve.values[2, step], expected.log_odds, atol=1e-3)
        assert curve.at(step=step) == pytest.approx(expected.mc_percent)
        assert curve.at("cloze", step) == pytest.approx(expected.cloze_percent)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert curve.loss[4] < curve.loss[0]


def test_bfloat16_models_are_attacked_in_full_precision() -> None:
    hf = tiny("llama").to(torch.bfloat16)
    curve = relearn(hf, tiny_attack(), steps=30, learning_rate=1e-3)
    assert curve.loss[-1] < 0.9 * curve.loss[0]
    assert next(hf.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_attacked(family: str) -> None:
    model = mtl.load(tiny(family))
    before = fingerprint(model)
    curve = relearn(model, tiny_attack(), steps=10, learning_rate=3e-3, ask_at=[0, 10])
    assert curve.loss[1] < curve.loss[0] and fingerprint(model) == before
    assert curve.at("log_odds") > curve.at("log_odds", 0)  # here the same facts are asked


def test_the_prior_by_hand() -> None:
    attack = dataclasses.replace(tiny_attack(), alike=torch.tensor([[True, False, True], [False, True, False]] * 6))
    hf = tiny("qwen3")
    curve = relearn(hf, attack, steps=1, ask_at=[0])
    unseen = attack.unseen
    logits = [hf(unseen.tokens[i : i + 1, : unseen.lengths[i]]).logits[0, -1] for i in range(3)]
    for q, alike in enumerate(((0, 2), (1,)) * 6):
        options = [logits[u][attack.questions.choices[q]] for u in alike]
        assert curve.prior[0, 0, q] == np.mean([int(o.argmax()) == 0 for o in options])
        assert curve.prior[1, 0, q] == np.mean(
            [int(logits[u].argmax() == attack.questions.choices[q, 0]) for u in alike]
        )
        odds = [(o[0] - o[1:].logsumexp(0)).item() for o in options]
        assert curve.prior[2, 0, q].item() == pytest.approx(np.mean(odds), abs=1e-4)
    assert torch.equal(curve.excess, curve.values - curve.prior)
    alone = dataclasses.replace(attack, unseen=attack.unseen[:0], alike=attack.alike[:, :0])
    blind = relearn(hf, alone, steps=1)
    assert blind.prior.isnan().all() and blind.to_dataframe()["excess_low"].isna().all()
    assert blind.to_dataframe()["interval_low"].notna().all()


def test_a_seed_gives_the_same_curve_twice(never, task) -> None:
    attack = attack_splits(task, splits=1)[0]
    one, two, other = (relearn(never, attack, steps=3, batch_size=8, ask_at=[0, 3], seed=s) for s in (1, 1, 2))
    assert torch.equal(one.values, two.values) and torch.equal(one.loss, two.loss)
    assert not torch.equal(one.values, other.values)


def test_suppressed_knowledge_comes_back_at_once_and_missing_knowledge_does_not(suppressed, never, task) -> None:
    attack = attack_splits(task, splits=1)[0]
    assert accuracy(suppressed, attack.questions).mc_percent < 45
    result = compare_relearning(
        {"suppressed": suppressed, "never trained": never},
        [attack],
        reference="never trained",
        learning_rates=[1e-3],
        steps=10,
        ask_at=[0, 10],
    )
    rows = result.summary().set_index("label")
    assert rows.loc["suppressed", "value"] > 65
    assert rows.loc["suppressed", "excess_low"] > 30
    assert rows.loc["never trained", "excess"] < 15
    assert rows.loc["suppressed", "over_reference_low"] > 25
    assert rows.loc["never trained", "over_reference"] == 0


def curve_of(label: str, attack: str, right: list[float], prior: list[float]) -> RelearningCurve:
    values, base = (torch.tensor(v, dtype=torch.float32).expand(3, 2, -1).clone() for v in (right, prior))
    return RelearningCurve(
        label, attack, "facts", 1e-3, 0, (0, 5), values, base, torch.ones(2), tuple(f"f{i}" for i in range(len(right)))
    )


def test_excess_over_prior_and_reference_by_hand(tmp_path: Path) -> None:
    curves = (
        curve_of("edited", "a", [1, 1, 0, 0], [0.5, 0.25, 0.25, 0]),
        curve_of("edited", "b", [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]),
        curve_of("never", "a", [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]),
        curve_of("never", "b", [0, 0, 0, 0], [0, 0, 0, 0.4]),
    )
    result = Relearning(curves, "never")
    row = result.summary().set_index("label").loc["edited"]
    assert row["value"] == pytest.approx(37.5) and row["prior"] == pytest.approx(25)
    assert row["excess"] == pytest.approx(12.5) and (row["splits"], row["step"]) == (2, 5)
    assert (row["lowest_split"], row["highest_split"]) == (pytest.approx(0), pytest.approx(25))
    assert row["reference_excess"] == pytest.approx(-5) and row["over_reference"] == pytest.approx(17.5)
    assert row["over_reference_low"] < 17.5 < row["over_reference_high"]
    again = Relearning.load(result.save(tmp_path / "r.safetensors"))
    pd.testing.assert_frame_equal(again.summary(), result.summary())
    pd.testing.assert_frame_equal(again.to_dataframe(), result.to_dataframe())
    assert "4 curves" in repr(again) and "<table" in again._repr_html_()
    one = RelearningCurve.load(curves[0].save(tmp_path / "c.safetensors"))
    assert one.facts == curves[0].facts and torch.equal(one.values, curves[0].values)
    assert "+25.0" in repr(one) and "<table" in one._repr_html_()
    assert result.summary("log_odds").loc[0, "excess"] == pytest.approx(0.125)


def test_relearning_refuses_what_makes_no_sense() -> None:
    hf, attack = tiny("llama"), tiny_attack()
    for options, message in (
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"steps": 5, "ask_at": [6]}, r"ask_at=\(6,\); choose steps in 0..5"),
        ({"steps": 20, "learning_rate": 1e30}, "lower learning_rate"),
    ):
        with pytest.raises(MansuError, match=message):
            relearn(hf, attack, **options)
    with pytest.raises(MansuError, match="0 sequences"):
        relearn(hf, dataclasses.replace(attack, text=attack.text[:0]))
    with pytest.raises(MansuError, match="needs dense ones"):
        relearn(mtl.load(tiny("llama", **_BLOCKS), quantized="nf4"), attack)
    curve = curve_of("edited", "a", [1.0], [0.0])
    with pytest.raises(MansuError, match="no measure 'luck'"):
        curve.at("luck")
    with pytest.raises(MansuError, match="not asked at step 3"):
        curve.at(step=3)
    with pytest.raises(MansuError, match="reference 'never' is none of edited"):
        Relearning((curve,), "never")
    with pytest.raises(MansuError, match="no curves"):
        Relearning(())
    with pytest.raises(MansuError, match="ask different questions"):
        Relearning((curve, curve_of("never", "a", [1.0, 0.0], [0.0, 0.0])))
    with pytest.raises(MansuError, match="two curves"):
        Relearning((curve, curve))
    with pytest.raises(MansuError, match="has no curve for 'a'"):
        Relearning((curve, curve_of("never", "b", [1.0], [0.0])), "never").summary()
    with pytest.raises(MansuError, match="reference 'never' is none of edited"):
        compare_relearning({"edited": mtl.load(hf)}, [attack], reference="never")


# Probes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 8), (10, 25)])
def test_ridge_is_least_squares_with_extra_rows(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) + 3
    y = torch.randn(shape[0], 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    for given in (None, weights):
        share = np.full(shape[0], 1 / shape[0]) if given is None else (given / given.sum()).numpy()
        centred = x.numpy() - share @ x.numpy()
        strength = 0.3 * (share[:, None] * centred**2).sum() / shape[1]
        rows = np.sqrt(share)[:, None] * np.hstack([x.numpy(), np.ones((shape[0], 1))])
        extra = np.sqrt(strength) * np.hstack([np.eye(shape[1]), np.zeros((shape[1], 1))])
        right = np.vstack([np.sqrt(share)[:, None] * y.numpy(), np.zeros((shape[1], 4))])
        expected = np.linalg.lstsq(np.vstack([rows, extra]), right, rcond=None)[0]
        fit, bias = ridge(x, y, 0.3, given)
        np.testing.assert_allclose(fit.numpy(), expected[:-1], atol=1e-10)
        np.testing.assert_allclose(bias.numpy(), expected[-1], atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_are_hugging_faces_hidden_states(family: str) -> None:
    hf, questions = tiny(family), tiny_questions()
    found = streams(mtl.load(hf), questions, batch_size=5)
    hidden = hf(questions.prompts, output_hidden_states=True).hidden_states
    for layer in range(2):  # the last hidden state has passed the final norm
        expected = hidden[layer][torch.arange(12), questions.lengths - 1]
        torch.testing.assert_close(found[layer].float(), expected, rtol=1e-4, atol=1e-4)
    assert found.shape == (3, 12, 32)
    assert probe(mtl.load(hf), questions, folds=2, penalties=[0.1], shuffles=1).right.shape == (3, 12)


def test_probes_tell_knowing_from_never_having_known(pocket, never, task) -> None:
    asked, near = task.questions["forget"], task.questions["near"]
    knows, unaware = (
        probe(m, asked, also_train=near, penalties=[1e-2], shuffles=3, label=name).to_dataframe().set_index("layer")
        for m, name in ((pocket, "pocket"), (never, "never"))
    )
    assert knows.loc["L3", "accuracy"] > 90 and knows.loc["L2", "interval_low"] > 75
    assert (unaware["accuracy"] < 40).all() and unaware["interval_low"].min() < 25
    assert abs(knows.loc["embed", "accuracy"] - 25) < 8  # the last token's embedding says nothing
    for frame in (knows, unaware):
        assert (abs(frame["shuffled"] - 25) < 10).all()
        assert (frame["chance"] == 25).all()


def test_a_planted_direction_is_found_by_the_probe_that_sees_it(monkeypatch) -> None:
    """Streams that hold the answer's unembedding vector at one layer only."""
    model, questions = mtl.load(tiny("llama")), tiny_questions(80)
    vectors = model.original_model.state_dict()["lm_head._original_component.weight"].double()
    noise = torch.randn(3, 80, 32, generator=torch.Generator().manual_seed(1)).double()
    noise[1] = 0.05 * noise[1] + vectors[questions.choices[:, 0]]
    monkeypatch.setattr("mansu_tl.verification.probes.streams", lambda *_: noise)
    result = probe(model, questions, folds=5, shuffles=2)
    scores = result.right.double().mean(1)
    assert scores[1] > 0.9 and scores[0] < 0.6 and scores[2] < 0.6
    assert result.shuffled[1].mean() < 0.6
    assert result.penalties[1] < result.penalties[0]


def test_guessing_is_at_chance_though_the_answer_left_out_is_rarer(monkeypatch) -> None:
    """Streams of noise, and answers that two further facts share: leaving a fact out makes its answer the rarest."""
    generator = torch.Generator().manual_seed(0)

    def asked(facts: int, kind: str) -> Questions:
        right = torch.arange(facts).repeat_interleave(4) % 16
        others = torch.stack([torch.randperm(15, generator=generator)[:3] for _ in right]) + 1
        choices = torch.cat([right[:, None], (right[:, None] + others) % 16], 1)
        names = tuple(f"{kind} {i // 4}" for i in range(4 * facts))
        return Questions(torch.full((4 * facts, 3), 5), torch.full((4 * facts,), 3), choices, names)

    noise = iter(torch.randn(2, 3, 128, 32, generator=generator, dtype=torch.float64))
    monkeypatch.setattr("mansu_tl.verification.probes.streams", lambda _, q, __: next(noise)[:, : len(q)])
    result = probe(mtl.load(tiny("llama")), asked(16, "a"), also_train=asked(32, "b"), folds=16, penalties=[10.0])
    assert 0.15 < result.right.double().mean() < 0.35
    assert 0.15 < result.shuffled.mean() < 0.35


def test_probes_are_kept_and_refuse_what_makes_no_sense(tmp_path: Path) -> None:
    model, questions = mtl.load(tiny("gpt2")), tiny_questions()
    result = probe(model, questions, folds=3, shuffles=1, seed=3)
    assert torch.equal(result.right, probe(model, questions, folds=3, shuffles=1, seed=3).right)
    again = Probes.load(result.save(tmp_path / "p.safetensors"))
    pd.testing.assert_frame_equal(again.to_dataframe(), result.to_dataframe())
    assert "chance 33 %" in repr(again) and "<table" in again._repr_html_()
    for options, message in (
        ({"folds": 1}, "folds=1 of 6 facts"),
        ({"folds": 7}, "folds=7 of 6 facts"),
        ({"penalties": [0.0]}, "penalties="),
        ({"shuffles": 0}, "shuffles=0"),
        ({"also_train": questions}, "memorise"),
    ):
        with pytest.raises(MansuError, match=message):
            probe(model, questions, **options)


# Depth ---------------------------------------------------------------------------------------------------------------


def test_depth_by_hand(tmp_path: Path) -> None:
    depth = ErasureDepth(
        label="hand",
        layers=("L0", "L1"),
        clean=torch.tensor([5.0, 5.0, 5.0]),
        never=torch.tensor([[2.0, 0.01, 0.0], [8.0, 4.0, -1.0]]),
        edited=torch.tensor([[1.0, 9.0, 0.0], [10.0, -1.0, 0.0]]),
        threshold=0.05,
        positions="all",
        metric="choice_log_odds",
        facts=("a", "b", "c"),
    )
    # pair 0: (2 * .5 + 8 * 1) / 10; pair 1: only L1 counts, erased 0 of 4; pair 2: no layer counts
    assert depth.per_pair[:2].tolist() == pytest.approx([0.9, 0.0])
    assert depth.per_pair[2].isnan()
    assert depth.value == pytest.approx(0.45)
    assert depth.interval == pytest.approx((0.0, 0.9))
    frame = depth.to_dataframe()
    assert frame["counted"].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert frame["erased"].tolist() == pytest.approx([10 / 2.01, 9 / 11])
    again = ErasureDepth.load(depth.save(tmp_path / "d.safetensors"))
    pd.testing.assert_frame_equal(again.to_dataframe(), frame)
    assert "0.450" in repr(again) and "<table" in again._repr_html_()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_depth_is_one_like_never_and_zero_like_the_original(family: str, positions: str) -> None:
    original, never = mtl.load(tiny(family)), mtl.load(tiny(family, seed=1))
    pairs = random_pairs(padded=True)
    with torch.no_grad():
        known = tiny(family)(pairs.clean).logits[torch.arange(len(pairs)), pairs.lengths - 1].argmax(1)
    choices = pairs.options.clone()
    choices[:, 0, 0] = known
    pairs = dataclasses.replace(pairs, options=choices)
    options = {"positions": positions, "batch_size": 4, "metric": answer_log_prob}
    same = erasure_depth(original, original, never, pairs, **options)
    gone = erasure_depth(original, never, never, pairs, **options)
    assert same.edited.abs().max() == 0 and same.value == 0
    assert gone.value == pytest.approx(1)
    # The same with plain Hugging Face: what enters block 1 and the final norm, taken from the other model.
    hf, other = tiny(family), tiny(family, seed=1)
    rows, last = torch.arange(len(pairs)), pairs.lengths - 1
    for layer, ends in enumerate(((".layers.1", ".h.1"), ("model.norm", "final_layer_norm", "ln_f"))):
        into, source = (next(m for n, m in x.named_modules() if n.endswith(ends)) for x in (hf, other))
        taken: list[torch.Tensor] = []

        def put(module: torch.nn.Module, args: tuple, taken: list = taken) -> tuple:
            stream = args[0].clone()
            where = (slice(None),) if positions == "all" else (rows, last)
            stream[where] = taken[0][where]
            return (stream, *args[1:])

        watch = source.register_forward_pre_hook(lambda _, args, taken=taken: taken.append(args[0]))
        with torch.no_grad():
            before = hf(pairs.clean).logits
            other(pairs.clean)
            patch = into.register_forward_pre_hook(put)
            after = hf(pairs.clean).logits
        patch.remove()
        watch.remove()
        drop = [answer_log_prob(logits[rows, last], pairs) for logits in (before, after)]
        torch.testing.assert_close(gone.never[layer], drop[0] - drop[1], rtol=1e-4, atol=1e-4)


def test_depth_sees_where_a_suppressor_sits(pocket, suppressed, never, task) -> None:
    pairs = task.forget_pairs[list(range(0, 192, 4))]
    depth = erasure_depth(pocket, suppressed, never, pairs)
    frame = depth.to_dataframe().set_index("layer")
    assert frame.loc[["L0", "L1", "L2"], "edited_drop"].abs().max() < 1e-4  # untouched layers hold all of it
    assert frame.loc["L3", "erased"] > 0.5
    assert depth.value < 0.3


def test_depth_refuses_what_makes_no_sense(pocket, never, task) -> None:
    pairs = random_pairs()
    with pytest.raises(MansuError, match="unknown positions 'subject'"):
        erasure_depth(pocket, pocket, never, task.forget_pairs, positions="subject")
    small = mtl.load(tiny("llama"))
    with pytest.raises(MansuError, match="the edited model has 2 layers of width 32, the original 4 of 128"):
        erasure_depth(pocket, small, never, pairs)
    with pytest.raises(MansuError, match="does not know the facts"):
        erasure_depth(small, small, small, pairs)


# Rediscovery ---------------------------------------------------------------------------------------------------------


def test_nothing_is_new_in_the_same_model_and_the_effects_are_the_models_own(pocket, never, task, tmp_path) -> None:
    pairs = task.forget_pairs[slice(0, 32)]
    circuit = mtl.discover_circuit(pocket, pairs, faithfulness=0.7, steps=2)
    result = rediscover(pocket, never, circuit, pairs, reference=pocket, steps=2, label="never")
    assert result.models == ("original", "reference", "never")
    assert result.jaccard(1) == 1.0 and result.jaccard() < 1
    assert result.mass(1) == pytest.approx(result.mass(0))
    assert result.mass(0) + result.mass(0, outside=False) == pytest.approx(1, abs=1e-5)
    assert result.mass(outside=False) < 0.2
    assert result.carried(0, "inside the old circuit")[0] == pytest.approx(circuit.faithfulness, abs=1e-4)
    assert result.carried(0, "every edge")[0] == pytest.approx(1, abs=1e-5)
    rows = torch.arange(len(pairs))
    for m, model in ((0, pocket), (2, never)):
        gaps = []
        for tokens in (pairs.clean, pairs.corrupt):
            logits = plain(model)(tokens).logits[rows, pairs.lengths - 1]
            gaps.append(logits[rows, pairs.answers] - logits[rows, pairs.distractors[:, 0]])
        torch.testing.assert_close(result.effects[m, 0], gaps[0] - gaps[1], rtol=1e-3, atol=1e-3)
    new = result.new_edges(5)
    assert not set(zip(new["writer"], new["reader"], strict=True)) & set(circuit.edges)
    assert new["never"].abs().is_monotonic_decreasing
    again = Rediscovery.load(result.save(tmp_path / "r.safetensors"))
    pd.testing.assert_frame_equal(again.to_dataframe(), result.to_dataframe())
    assert "Jaccard" in repr(again) and "<table" in again._repr_html_()
    with pytest.raises(MansuError, match="no route 'luck'"):
        result.carried(0, "luck")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_path_outside_the_circuit_is_seen(family: str) -> None:
    """With the edge from the embedding to the output as the whole old circuit, everything else lies outside."""
    model, pairs = mtl.load(tiny(family)), random_pairs()
    scores = mtl.edge_attribution(model, pairs, steps=1)
    mask = torch.zeros_like(scores.exists)
    mask[0, -1] = True
    circuit = Circuit.from_mask(scores, mask, "by hand")
    result = rediscover(model, model, circuit, pairs, steps=1, label="itself")
    assert result.mass() == pytest.approx(1 - result.mass(outside=False), abs=1e-5)
    ends = mtl.circuit.patch_edges(model, pairs, torch.stack([scores.exists & ~mask, mask & ~mask]).float())
    torch.testing.assert_close(result.effects[1, 1], ends[0] - ends[1], rtol=1e-4, atol=1e-5)
    assert result.effects[1, 1].abs().max() > 1e-3


def test_rediscovery_refuses_what_makes_no_sense() -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    scores = mtl.edge_attribution(model, pairs, steps=1)
    circuit = Circuit.top(scores, 20)
    with pytest.raises(MansuError, match="no edge"):
        rediscover(model, model, dataclasses.replace(circuit, mask=circuit.mask & ~circuit.mask), pairs)
    with pytest.raises(MansuError, match="label 'original' is taken"):
        rediscover(model, model, circuit, pairs, label="original")
    with pytest.raises(MansuError, match="not this model's"):
        rediscover(model, mtl.load(tiny("llama", num_hidden_layers=3)), circuit, pairs)
    same = dataclasses.replace(pairs, corrupt=pairs.clean)
    with pytest.raises(MansuError, match="no difference"):
        rediscover(model, model, circuit, same)


# Damage --------------------------------------------------------------------------------------------------------------


def texts(n: int = 10) -> dict[str, Sequences]:
    questions = tiny_questions(n)
    return {"some": Sequences(questions.prompts, questions.lengths)}


@pytest.mark.parametrize("family", FAMILIES)
def test_damage_against_hugging_face(family: str, tmp_path: Path) -> None:
    hf = tiny(family)
    model = mtl.load(hf, tokenizer=tiny_tokenizer())
    ends = ("layers.0.mlp.down_proj.weight", "layers.0.mlp.dense_4h_to_h.weight", "h.0.mlp.c_proj.weight")
    name = next(name for name in parameters(model) if name.endswith(ends))
    edited = rebuild(model, {name: parameters(model)[name] * 1.1})
    audit = damage(model, edited, texts(), prompts=["w5 w6 w7", "w9 w8"], max_new_tokens=4, batch_size=4)
    text = texts()["some"]
    labels = torch.where(torch.arange(7)[None] < text.lengths[:, None], text.tokens, -100)
    for column, bridge in (("before", model), ("after", edited)):
        assert audit.loss.loc[0, column] == pytest.approx(
            plain(bridge)(text.tokens, labels=labels).loss.item(), rel=1e-4
        )
    weights = audit.weights.set_index("matrix")
    assert weights.loc["L0.down", "relative_change"] == pytest.approx(0.1, rel=1e-4)
    assert weights.loc["L0.down", "norm_before"] == pytest.approx(parameters(model)[name].norm().item(), rel=1e-4)
    assert (weights.drop(index="L0.down")[["relative_change", "changed_share"]] == 0).all(axis=None)
    assert weights["weights"].sum() == sum(p.numel() for p in parameters(model).values())
    layers = audit.activations.set_index("layer")
    assert layers.loc["embed", "relative_change"] == 0 and layers.loc["embed", "cosine"] == pytest.approx(1)
    assert layers.loc["L0", "relative_change"] > 0 and layers.loc["L1", "norm_after"] > 0
    hidden = hf(text.tokens, output_hidden_states=True).hidden_states[1]
    real = torch.arange(7)[None] < text.lengths[:, None]
    assert layers.loc["L0", "norm_before"] == pytest.approx(hidden[real].norm(dim=-1).mean().item(), rel=1e-4)
    again = Damage.load(audit.save(tmp_path / "d.safetensors"))
    for part in ("loss", "weights", "activations", "generations"):
        pd.testing.assert_frame_equal(again.to_dataframe(part), audit.to_dataframe(part))
    assert "loss some" in repr(again) and again._repr_html_().count("<table") == 4


def test_an_unedited_model_is_undamaged_and_writes_what_hugging_face_writes(pocket, task) -> None:
    prompts = ["the catalyst of amber balm is", "brewers start lunar nectar with"]
    audit = damage(pocket, pocket, {"near": task.near_text[slice(0, 64)]}, prompts=prompts, max_new_tokens=6)
    assert audit.loss.loc[0, "rise"] == 0 and audit.weights["relative_change"].max() == 0
    assert audit.activations["relative_change"].max() == 0
    assert audit.generations["same"].all()
    for i, prompt in enumerate(prompts):
        ids = pocket.tokenizer(f"<bos> {prompt}", add_special_tokens=False, return_tensors="pt").input_ids
        out = plain(pocket).generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
            eos_token_id=pocket.tokenizer.eos_token_id, pad_token_id=0,
        )  # fmt: skip
        written = pocket.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert audit.generations.loc[i, "before"] == written


def test_damage_refuses_what_makes_no_sense() -> None:
    model = mtl.load(tiny("llama"))
    with pytest.raises(MansuError, match="at least one"):
        damage(model, model, {})
    with pytest.raises(MansuError, match="one token"):
        damage(model, model, {"x": Sequences(torch.tensor([[3, 4]]), torch.tensor([1]))})
    with pytest.raises(MansuError, match="one shape"):
        damage(model, mtl.load(tiny("llama", num_hidden_layers=3)), texts())
    with pytest.raises(MansuError, match="no tokenizer"):
        damage(model, model, texts(), prompts=["w5"])
    with pytest.raises(MansuError, match="max_new_tokens=0"):
        damage(mtl.load(tiny("llama"), tokenizer=tiny_tokenizer()), model, texts(), prompts=["w5"], max_new_tokens=0)
    with pytest.raises(MansuError, match="no table 'luck'"):
        damage(model, model, texts()).to_dataframe("luck")


# 4-bit models and intervals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_a_four_bit_model_is_judged_as_its_twin(family: str) -> None:
    sizes = {"hidden_size": 64, "n_inner" if family == "gpt2" else "intermediate_size": 128}
    if family == "llama":
        sizes["head_dim"] = 16
    dense, never = mtl.load(tiny(family, **sizes)), mtl.load(tiny(family, seed=1, **sizes))
    real, twin = mtl.load(tiny(family, **sizes), quantized="nf4"), mtl.quantize(dense, "nf4")
    pairs, questions = random_pairs(), tiny_questions()
    depths = [erasure_depth(dense, m, never, pairs, metric=answer_log_prob).edited for m in (real, twin)]
    torch.testing.assert_close(*depths, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(streams(real, questions), streams(twin, questions), rtol=1e-5, atol=1e-5)
    audits = [damage(dense, m, texts()) for m in (real, twin)]
    pd.testing.assert_frame_equal(audits[0].loss, audits[1].loss, rtol=1e-4)
    pd.testing.assert_frame_equal(audits[0].weights, audits[1].weights, rtol=1e-4)
    assert audits[0].weights["relative_change"].max() > 0.01
    circuit = Circuit.top(mtl.edge_attribution(dense, pairs, steps=1), 20)
    found = [rediscover(dense, m, circuit, pairs, steps=1) for m in (real, twin)]
    torch.testing.assert_close(found[0].scores, found[1].scores, rtol=1e-4, atol=1e-5)


def test_intervals_draw_facts_not_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    per_fact = torch.randn(20, generator=generator)
    rows = per_fact.repeat_interleave(10)
    facts = [f"f{i // 10}" for i in range(200)]
    together = interval_over_facts(rows, facts)
    assert together == pytest.approx(interval_over_facts(per_fact, [f"f{i}" for i in range(20)]), abs=1e-9)
    apart = interval_over_facts(rows, [str(i) for i in range(200)])
    assert apart[1] - apart[0] < 0.5 * (together[1] - together[0])
    half = per_fact.std().item() * 1.96 / 20**0.5
    assert together[1] - together[0] == pytest.approx(2 * half, rel=0.2)
    assert random_pairs().facts == tuple(str(i) for i in range(len(random_pairs())))


def test_losses_are_per_token(pocket, task) -> None:
    text = task.near_text[slice(0, 8)]
    audit = damage(pocket, pocket, {"near": text})
    logits = plain(pocket)(text.tokens).logits
    parts = [
        F.cross_entropy(logits[i, : n - 1], text.tokens[i, 1:n], reduction="sum").item()
        for i, n in enumerate(text.lengths.tolist())
    ]
    assert audit.loss.loc[0, "before"] == pytest.approx(sum(parts) / int((text.lengths - 1).sum()), rel=1e-5)
