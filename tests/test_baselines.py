"""Every baseline's loss by hand, what it may move, the search, and the split that it is chosen on."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path

import pytest
import torch

import mansu_tl as mtl
from mansu_tl.data.split import split_questions
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, linear_weights, parameters, plain
from mansu_tl.quantization import quantize
from mansu_tl.registry import Registry
from mansu_tl.runs.values import stream_into
from mansu_tl.unlearning import (
    Edit,
    Method,
    Objective,
    Recipe,
    RetainSettings,
    TrainingSettings,
    methods,
    objectives,
    register,
    registry,
    settings_of,
    trained,
    unlearn,
)
from mansu_tl.unlearning.batches import Batch, Source
from mansu_tl.unlearning.objectives import ascent, divergence, likelihood
from mansu_tl.unlearning.recipes.sure import salient_weights
from mansu_tl.unlearning.retain_statistics import input_moments, null_projector
from mansu_tl.unlearning.search import Search, Trial, search
from mansu_tl.unlearning.training import Start, train
from tests.tiny import FAMILIES, embedded_task, sliced_task, tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def task():
    return sliced_task(16, retain=48)


def recipe_of(model, task, method: str, seed: int = 0, **settings) -> Recipe:
    """What a method does in the shared training."""
    module = importlib.import_module(f"mansu_tl.unlearning.recipes.{method.replace('ga-kl', 'ga').replace('-', '_')}")
    make = getattr(module, method.replace("-", "_"))
    return make(settings_of(method, settings), Start(model, task, seed))


def batch_of(hf, values, pairs, text, original=None, before=None) -> Batch:
    """A batch of all these pairs and sequences, held against `original`."""
    source = Source(hf, values if original is None else original, pairs, text, text[:0])
    source._answers = before  # what it would keep of the original
    return Batch(source, values, torch.arange(len(pairs)), torch.arange(len(text)), len(text))


def first_loss(monkeypatch, model, task, method: str, **settings) -> float:
    """A method's loss where the answer has logit 2 (6 in the original), everything else 0, and retain terms are known."""
    answer = int(task.forget_pairs.answers[0])
    logits, before = torch.zeros(1, 443), torch.zeros(1, 443)
    logits[0, answer], before[0, answer] = 2.0, 6.0
    objective = recipe_of(model, task, method, **settings).objective
    monkeypatch.setattr(Batch, "forget_logits", property(lambda self: logits))
    monkeypatch.setattr(objectives, "cross_entropy", lambda found, targets: torch.tensor(0.25))
    monkeypatch.setattr(objectives, "kl_divergence", lambda found, original: torch.tensor(0.125))
    hf = plain(model)
    values = {name: value.detach() for name, value in hf.named_parameters()}
    return objective(batch_of(hf, values, task.forget_pairs[[0]], task.retain_text[:2], before=before)).item()


LOG_P = 2.0 - math.log(math.exp(2.0) + 442)
LOG_P0 = 6.0 - math.log(math.exp(6.0) + 442)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("ga", {}, LOG_P),
        ("ga-kl", {"divergence_weight": 2.0}, LOG_P + 2 * 0.125),
        ("graddiff", {"retain_weight": 3.0}, LOG_P + 3 * 0.25),
        ("npo", {"beta": 0.1}, 20 * math.log1p(math.exp(0.1 * (LOG_P - LOG_P0))) + 0.25),
        ("simnpo", {"beta": 2.5, "gamma": 0.5}, 0.8 * math.log1p(math.exp(2.5 * LOG_P + 0.5)) + 0.25),
        ("sure", {}, LOG_P + 0.25),
        ("ste", {}, LOG_P + 0.25),
        ("lora", {}, 20 * math.log1p(math.exp(0.1 * (LOG_P - LOG_P0))) + 0.25),
        ("lora", {"objective": "ga-kl", "retain_weight": 2.0}, LOG_P + 2 * 0.125),
        ("null-space", {}, LOG_P),
        ("suppressor", {"beta": 0.1}, 20 * math.log1p(math.exp(0.1 * (LOG_P - LOG_P0))) + 0.25),
        # The answer's logit moved by 4, nothing else: rms 4 / sqrt(443), mean 4 / 443, half a step is 6 / 30.
        ("quail", {"margin_steps": 2.0}, LOG_P + (0.8 - 4 / math.sqrt(443)) + 0.25),
        ("quail", {"margin_steps": 2.0, "distance": "mean"}, LOG_P + (0.8 - 4 / 443) + 0.25),
        ("quail", {"margin_steps": 11.0, "distance": "max"}, LOG_P + (4.4 - 4) + 0.25),
        ("quail", {"margin_steps": 11.0, "distance": "answer", "hinge_weight": 2.0}, LOG_P + 2 * (4.4 - 4) + 0.25),
    ],
)
def test_a_loss_by_hand(monkeypatch, model, task, method: str, settings: dict, expected: float) -> None:
    whole = dataclasses.replace(task, retain_text=embedded_task().retain_text)
    assert first_loss(monkeypatch, model, whole, method, **settings) == pytest.approx(expected, abs=2e-5)


def test_retain_divergence_is_zero_at_the_original_and_the_kl_elsewhere(model, task) -> None:
    hf, other = plain(model), plain(mtl.load("pocket-never"))
    here, there = (dict(m.named_parameters()) for m in (hf, other))
    text = task.retain_text[slice(0, 2)]
    pair = task.forget_pairs[[0]]
    assert divergence(batch_of(hf, here, pair, text)).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        p, q = (m(text.tokens).logits[:, :-1].double().log_softmax(-1) for m in (hf, other))
    real = torch.arange(1, text.tokens.shape[1])[None] < text.lengths[:, None]
    wanted = (p.exp() * (p - q)).sum(-1)[real].mean().item()
    assert divergence(batch_of(hf, there, pair, text, here)).item() == pytest.approx(wanted, rel=1e-4)


def test_rmu_by_hand(model, task) -> None:
    """On the un-edited model the retain term is 0 and the other the distance to the steering vector."""
    hf = plain(model)
    values = dict(hf.named_parameters())
    objective = recipe_of(model, task, "rmu", seed=4, steering=3.0, depth=0.5).objective
    loss = objective(batch_of(hf, values, task.forget_pairs, task.retain_text)).item()
    pairs = task.forget_pairs
    with torch.no_grad():
        hidden = plain(model)(pairs.clean, output_hidden_states=True).hidden_states[2]
    states = hidden[torch.arange(pairs.clean.shape[1])[None] < pairs.lengths[:, None]]
    u = torch.rand(128, generator=torch.Generator().manual_seed(4))
    target = 3.0 * states.norm(dim=-1).mean() * u / u.norm()
    assert loss == pytest.approx((states - target).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_into_a_module_is_the_models_own_and_nothing_behind_it_is_run(family: str) -> None:
    bridge = mtl.load(tiny(family), tokenizer=tiny_tokenizer())
    hf, parts, tokens = plain(bridge), bridge.adapter.component_mapping, torch.randint(5, 40, (2, 5))
    with torch.no_grad():
        every = hf(tokens, output_hidden_states=True).hidden_states
    layer, norm = f"{parts['blocks'].name}.1", parts["ln_final"].name
    ran: list[torch.nn.Module] = []
    with hf.get_submodule(layer).register_forward_hook(lambda module, *_: ran.append(module)):
        torch.testing.assert_close(stream_into(hf, {}, tokens, layer), every[1])
        assert not ran
    before_norm = stream_into(hf, {}, tokens, norm)
    # The last of transformers' states is behind the final norm.
    torch.testing.assert_close(hf.get_submodule(norm)(before_norm), every[-1])


def test_rmu_moves_only_its_layers_and_the_suppressor_only_the_last_mlp(model, task) -> None:
    steered = unlearn(model, task, "rmu", learning_rate=1e-3, max_steps=2)
    assert {name.split(".")[2] for name in steered.indices} == {"0", "1"}
    assert all(".mlp." in name for name in steered.indices)
    quiet = unlearn(model, task, "suppressor", learning_rate=1e-3, max_steps=2)
    assert {name.rsplit(".", 2)[0] for name in quiet.indices} == {"model.layers.3.mlp"}


def test_sure_moves_only_the_modules_with_the_largest_gradient(model, task) -> None:
    masks = salient_weights(model, task, 0.05)
    edit = unlearn(model, task, "sure", share=0.05, learning_rate=1e-3, max_steps=2)
    for name, index in edit.indices.items():
        assert masks[name].flatten()[index].all()
    # By hand: the neuron that was chosen first has a larger mean squared gradient than the last that was not.
    hf, cmap = plain(model).requires_grad_(True), Anatomy.of(model)
    pairs = task.forget_pairs
    logits = hf(pairs.clean).logits[torch.arange(len(pairs)), pairs.lengths - 1]
    torch.nn.functional.cross_entropy(logits, pairs.answers).backward()
    grads = {name: p.grad for name, p in hf.named_parameters()}

    def score(n: int) -> float:
        parts = [grads[s.parameter].narrow(s.dim, s.start, s.stop - s.start) for s in cmap.slices(f"MLP1.N{n}")]
        return sum(p.square().sum().item() for p in parts) / sum(p.numel() for p in parts)

    down = masks.get("model.layers.1.mlp.down_proj.weight", torch.zeros(128, 320, dtype=torch.bool))
    inside = [n for n in range(320) if down[:, n].all()]
    outside = [n for n in range(320) if not down[:, n].any()]
    assert inside
    assert min(map(score, inside)) > max(map(score, outside))


def test_null_space_updates_leave_retain_inputs_where_they_were(model, task) -> None:
    text = embedded_task().retain_text
    whole = dataclasses.replace(task, retain_text=text)
    edit = unlearn(model, whole, "null-space", leak=0.02, learning_rate=1e-3, max_steps=3)
    edited = parameters(edit.apply(model))
    moments = input_moments(plain(model), linear_weights(model), text.joined(task.near_text))
    for name, moment in moments.items():
        change = (edited[name] - parameters(model)[name]).double()
        felt = ((change @ moment.double()) * change).sum() / moment.trace()
        assert felt <= 0.02 * change.square().sum() * 1.01
    with pytest.raises(MansuError, match="raise leak"):
        null_projector(torch.eye(4), 0.1, "w")


def test_straight_through_sees_the_quantized_model(task) -> None:
    """Its forget logits are those of the NF4 twin, and gradients reach the weights behind the rounding."""
    model = mtl.load("pocket-fp")
    hf = plain(model)
    values = {n: p.detach().clone().requires_grad_() for n, p in hf.named_parameters()}
    view = recipe_of(model, task, "ste").view
    logits = batch_of(hf, view(values), task.forget_pairs, task.retain_text, values).forget_logits
    (grad,) = torch.autograd.grad(logits.sum(), values["model.layers.0.mlp.up_proj.weight"])
    pairs = task.forget_pairs
    with torch.no_grad():
        wanted = plain(quantize(model, "nf4"))(pairs.clean).logits[torch.arange(16), pairs.lengths - 1]
    torch.testing.assert_close(logits.detach(), wanted, rtol=0, atol=1e-4)
    assert grad.abs().max() > 0


def test_the_shared_loop_holds_what_may_not_move(model, task) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    mask = torch.zeros(320, 128, dtype=torch.bool)
    mask[7] = True
    settings = TrainingSettings(learning_rate=1e-2, max_steps=2)
    edit = train(model, task, "x", Recipe(Objective(ascent), only={name: mask}), settings)
    assert set(edit.indices) == {name}
    assert mask.flatten()[edit.indices[name]].all()
    with pytest.raises(MansuError, match="no weight may move"):
        train(model, task, "x", Recipe(Objective(likelihood), only={name: mask & False}), settings)


def test_a_method_is_one_file(model, task, monkeypatch, tmp_path: Path) -> None:
    """Written beside the package, imported, and run by its name; a name is given once."""
    monkeypatch.setattr(registry, "_METHODS", Registry("method", registry._METHODS))
    (tmp_path / "ga_held.py").write_text(
        "from dataclasses import dataclass\n"
        "from mansu_tl.unlearning import Objective, Recipe, RetainSettings, trained\n"
        "from mansu_tl.unlearning.objectives import ascent, divergence\n"
        "@dataclass(frozen=True)\n"
        "class Settings(RetainSettings):\n"
        "    power: float = 1.0\n"
        "@trained('ga-held', 'GA, held', Settings, searched=False)\n"
        "def ga_held(settings, start):\n"
        "    return Recipe(Objective(lambda b: settings.power * ascent(b), divergence, settings.retain_weight))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("ga_held")
    assert methods()[-1] == "ga-held" and mtl.unlearning.methods() == methods()
    options = {"max_steps": 3, "learning_rate": 1e-4}
    edit = unlearn(model, task, "ga-held", retain_weight=0.5, **options)
    assert edit.method == "ga-held"
    same = unlearn(model, task, "ga-kl", divergence_weight=0.5, **options)
    assert all(torch.equal(value, same.new[name]) for name, value in edit.new.items())
    other = unlearn(model, task, "ga-held", power=-1.0, **options)
    assert any(not torch.equal(value, edit.new[name]) for name, value in other.new.items())
    with pytest.raises(MansuError, match=r"ga-held: unknown setting 'powr'.*did you mean 'power'"):
        unlearn(model, task, "ga-held", powr=1.0)

    def nothing(model, task, settings, *, circuit=None, **rest) -> Edit:
        return Edit.between(model, {}, "nothing", {"circuit": circuit})

    register(Method("nothing", "Nothing", TrainingSettings, nothing, takes_circuit=True))
    assert unlearn(model, task, "nothing").n_weights == 0
    with pytest.raises(MansuError, match="method 'npo': registered already"):
        trained("npo", "Mine", RetainSettings)(lambda settings, start: Recipe(Objective(ascent)))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("quail", {"distance": "cosine"}, "distance='cosine'; choose one of rms, mean, max, answer"),
        ("rmu", {"depth": 0.0}, "depth=0.0; choose a share"),
        ("sure", {"share": 2.0}, "share=2.0; choose a share"),
        ("null-space", {"leak": 1.5}, "leak=1.5; choose a share"),
        ("ste", {"quantizer": "gptq-int4-g64"}, "has no cells"),
        (
            "ga",
            {"learning_rate": 1e6, "max_steps": 40, "stop_over_chance": -101.0, "check_every": 100},
            "lower learning_rate",
        ),
    ],
)
def test_bad_settings_are_named(model, task, method: str, settings: dict, message: str) -> None:
    with pytest.raises(MansuError, match=message):
        unlearn(model, task, method, **settings)


def test_a_split_keeps_every_fact_on_one_side_and_all_training_text() -> None:
    task = embedded_task()
    validation, test = split_questions(task)
    assert validation.forget_pairs is task.forget_pairs
    for name, questions in task.questions.items():
        sides = [set(part.questions[name].facts) for part in (validation, test)]
        assert not sides[0] & sides[1]
        assert sides[0] | sides[1] == set(questions.facts)
        assert len(validation.questions[name]) + len(test.questions[name]) == len(questions)
    known = {name: set(q.facts) for name, q in validation.questions.items()}
    for name in ("forget", "near", "retain"):
        assert known[name] == known[f"{name}_paraphrase"]
    assert len(known["forget"]) == 16
    other, _ = split_questions(task, seed=1)
    assert set(other.questions["forget"].facts) != known["forget"]
    with pytest.raises(MansuError, match="share=1"):
        split_questions(task, 1.0)
    one = dataclasses.replace(task, questions={**task.questions, "near": task.questions["near"][[0]]})
    with pytest.raises(MansuError, match="the near set asks 1 fact"):
        split_questions(one)


@pytest.mark.slow
def test_a_search_takes_the_rate_that_forgets_and_loses_least(model, task, tmp_path: Path) -> None:
    validation, _ = split_questions(embedded_task())
    small = dataclasses.replace(
        validation, forget_pairs=task.forget_pairs, retain_text=task.retain_text, near_text=task.near_text
    )
    found = search(
        model, small, "graddiff", rates=(1e-6, 3e-4, 1e-2), max_steps=12, check_every=4, stop_over_chance=-100.0
    )
    by_rate = {trial.rate: trial for trial in found.trials}
    assert not by_rate[1e-6].reached
    assert by_rate[1e-2].drop > by_rate[3e-4].drop
    again = Search.load(found.save(tmp_path / "s.safetensors"))
    assert again == found
    assert found.to_dataframe()["chosen"].sum() == 1
    assert "graddiff" in repr(found)
    broken = search(model, small, "ga", rates=(1e6,), max_steps=40, stop_over_chance=-101.0, check_every=100)
    with pytest.raises(MansuError, match="no learning rate of ga gave an edit"):
        _ = broken.best
    assert not broken.to_dataframe()["chosen"].any()
    with pytest.raises(MansuError, match="no rates"):
        search(model, small, "ga", rates=())
    with pytest.raises(MansuError, match="unknown setting"):
        search(model, small, "ga", rates=(1e-4,), nonsense=1)


def test_the_choice_of_a_rate_by_hand() -> None:
    def best(*trials: tuple[float, float, float]) -> float:
        return Search("ga", tuple(Trial(rate, forget, 30.0, drop) for rate, forget, drop in trials), 0).best.rate

    assert best((1e-5, 90.0, 0.0), (1e-4, 29.0, 9.0), (1e-3, 10.0, 4.0)) == 1e-3
    assert best((1e-5, 90.0, 0.0), (1e-4, 50.0, 9.0)) == 1e-4
    assert best((1e-5, 20.0, 3.0), (1e-4, 10.0, 3.0)) == 1e-4
