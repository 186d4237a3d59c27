"""The whole road in stages, on any device and in any dtype: what the device, dtype and left-state tests all walk.

A stage takes a `Case` and gives numbers, on the CPU. Numbers under a name with "!" hang on single bits (which weights an
optimisation of few steps moved): they are the same on one set of kernels and need not be on another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import mansu_tl as mtl
from mansu_tl.circuit import Circuit, Graph, random_mask
from mansu_tl.data.sources import Choice, Fluency, LumeItem, MuseItem, Probe, Request
from mansu_tl.data.sources.tofu import Tofu
from mansu_tl.data.sources.tofu.files import Item
from mansu_tl.explorer import Explorer
from mansu_tl.models import fingerprint, float32_copy, linear_weights, parameters, plain, rebuild
from mansu_tl.quantization import inputs_of, predicted_flips, quantized_values, quantizer
from mansu_tl.quantization.dither import dither
from mansu_tl.unlearning import Edit, method_flags, methods
from mansu_tl.unlearning.search import judge
from mansu_tl.verification import (
    AdversarialSuffix,
    BudgetPlan,
    SoftPrompt,
    Subject,
    adversarial_suffix,
    ask_behind,
    attack_splits,
    certify,
    circuit_scores,
    compare_relearning,
    damage,
    erasure_depth,
    evaluate_choices,
    evaluate_counterfact,
    evaluate_lume,
    evaluate_muse,
    evaluate_rwku,
    evaluate_rwku_utility,
    evaluate_tofu,
    hints,
    leak_at_k,
    logit_lens,
    measure,
    membership,
    memorisation,
    near_attack,
    probe,
    rediscover,
    relearn,
    relearning_budgets,
    soft_prompt,
    unrelated_attack,
)
from tests.tiny import lettered_tokenizer, tiny, tiny_tokenizer
from tests.tiny_study import crossing_edit

Numbers = dict[str, Tensor]
BASELINES = tuple(name for name in methods() if not method_flags(name).takes_circuit)
# Few steps of everything that MANSU has: floor over two grids, attacker, null space, Fisher, discovered neighbours.
MANSU = {
    "quantizer": "nf4+int4-g64", "steps": 12, "learning_rate": 0.5, "budget": 0.2, "fisher_sequences": 3,
    "retain_budget": 1e3, "neuron_share": 1.0, "adversary_steps": 2, "adversary_spread": 2.0, "discover_near": 0.5,
    "adversary_kinds": "weights+adapters+near",
    "place_weight": 1.0, "odds_weight": 0.3,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model with everything that later stages need of earlier ones."""

    model: TransformerBridge
    task: mtl.data.Task
    circuit: Circuit
    edit: Edit
    edited: TransformerBridge
    never: TransformerBridge


def case(family: str = "llama", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Case:
    """A tiny random model of a family; circuit and edit are made on the CPU, the same for every device."""
    tokenizer, task = tiny_tokenizer(), tiny_task()
    here = mtl.load(tiny(family), tokenizer=tokenizer, dtype=dtype)
    circuit = Circuit.top(mtl.edge_attribution(here, task.forget_pairs, steps=1), 60)
    edit = crossing_edit(here)
    model = mtl.load(plain(here), tokenizer=tokenizer, device=device)
    never = mtl.load(tiny(family, seed=1), tokenizer=tokenizer, device=device, dtype=dtype)
    return Case(model, task, circuit, edit, edit.apply(model), never)


def tiny_task() -> mtl.data.Task:
    """Six pairs over three facts in two lengths, text, near text and never-seen prompts, in tokens."""
    rows = [(fact, wording) for fact in range(3) for wording in range(2)]
    clean = torch.tensor([[1, 5 + f, 20 + w, 30 + f, 40][: 4 + w] + [0] * (1 - w) for f, w in rows])
    corrupt = clean.clone()
    corrupt[:, 1] += 7
    answers, distractors = torch.tensor([6 + f for f, _ in rows]), torch.tensor([[40 + f, 43 + f, 46] for f, _ in rows])
    lengths, names = torch.tensor([4 + w for _, w in rows]), [f"fact {f}" for f, _ in rows]
    pairs = mtl.data.PromptPairs.from_tokens(clean, corrupt, answers, distractors, lengths, names, facts=names)
    drawn = torch.randint(3, 60, (12, 8), generator=torch.Generator().manual_seed(0))
    text = mtl.data.Sequences(drawn, torch.full((12,), 8))
    near = mtl.data.Sequences(drawn[:2, :5], torch.tensor([4, 5]))
    unseen = mtl.data.Sequences(torch.tensor([[1, 50, 20, 30], [1, 51, 20, 31], [1, 52, 21, 32]]), torch.full((3,), 4))
    facts = pairs.facts
    asked = torch.cat([answers[:, None], distractors], 1)
    far = mtl.data.Questions(clean + 2, lengths, asked + 4, tuple(f"far {fact}" for fact in facts))
    questions = {"forget": mtl.data.Questions(clean, lengths, asked, facts), "retain": far}
    return mtl.data.Task("tiny", pairs, pairs, text, near, unseen, questions)


def _accuracy(c: Case) -> Numbers:
    return {name: mtl.accuracy(c.model, asked).log_odds for name, asked in c.task.questions.items()}


def _edges(c: Case) -> Numbers:
    pairs, model = c.task.forget_pairs, c.model
    full = mtl.edge_attribution(model, pairs, steps=3, per_pair=True, per_position="end")
    mean = mtl.runs.ablation(model, "mean", reference=c.task.retain_text, per_position=True)
    averaged = mtl.edge_attribution(model, pairs, method="eap", ablation=mean)
    assert full.per_pair is not None and full.per_position is not None
    return {
        "total": full.tensor, "pairs": full.per_pair, "positions": full.per_position, "mean": averaged.tensor,
        "two ends": mtl.edge_attribution(model, pairs, method="clean-corrupted").tensor,
    }  # fmt: skip


def _nodes(c: Case) -> Numbers:
    pairs = c.task.forget_pairs
    nodes = mtl.patching.node_attribution(c.model, pairs, qk_fix=True, per_position=True)
    neurons = mtl.patching.neuron_attribution(c.model, pairs, steps=2, per_position="end")
    assert nodes.per_position is not None and neurons.per_position is not None
    return {"nodes": nodes.tensor, "positions": nodes.per_position, "neurons": neurons.tensor}


def _sweeps(c: Case) -> Numbers:
    pairs = c.task.forget_pairs
    out = {
        name: mtl.activation_patching(c.model, pairs, component=name, by=by, per_pair=True).tensor
        for name, by in {
            "resid_pre": None, "z": None, "k": "head-position", "pattern": None, "mlp_out": "layer", "attn_out": None,
        }.items()
    }  # fmt: skip
    zero = mtl.runs.ablation(c.model, "zero")
    return {**out, "zero": mtl.activation_patching(c.model, pairs, direction="noising", ablation=zero).tensor}


def _circuits(c: Case) -> Numbers:
    model, pairs, circuit = c.model, c.task.forget_pairs, c.circuit
    scores = _scores(c)
    mean = mtl.runs.ablation(model, "mean", reference=pairs)
    edges = circuit.edges[:2]
    return {
        "curve": mtl.circuit.faithfulness_curve(model, scores, pairs, [5, 20, 60], control_seeds=1).faithfulness,
        "discovered!": mtl.discover_circuit(model, pairs, faithfulness=0.3, steps=1).mask,
        "found": torch.tensor(
            [
                mtl.circuit.faithfulness(model, circuit, pairs, ablation=mean),
                mtl.circuit.completeness(model, circuit, pairs),
                *mtl.circuit.random_faithfulness(model, circuit, pairs, seeds=2),
            ]
        ),
        "minimality": mtl.circuit.minimality(model, circuit, pairs).edge_drops,
        "paths": mtl.circuit.path_patching(model, pairs, edges).per_pair,
        "masks": mtl.circuit.patch_edges(model, pairs, torch.stack([circuit.mask, 0.5 * circuit.mask.float()])),
    }


def _edit(edit: Edit) -> Numbers:
    new = torch.cat([value.double() for value in edit.new.values()])
    index = torch.cat(list(edit.indices.values()))
    first = {key: torch.tensor(float(value)) for key, value in edit.history[0].items()}
    return {"new!": new, "index!": index, **{f"first {key}": value for key, value in first.items()}}


def _mansu(c: Case) -> Numbers:
    edit = mtl.unlearn(c.model, c.task, "mansu", circuit=c.circuit, **MANSU)
    projected = mtl.unlearn(
        c.model, c.task, "random-circuit", circuit=c.circuit,
        **{**MANSU, "quantizer": "nf4", "projector": True, "leak": 0.3, "floor": "after", "retain_budget": 0.0},
    )  # fmt: skip
    facts = [float(edit.facts[key]) for key in ("retain_loss_before", "candidates")]
    assert edit.n_weights and projected.n_weights
    return {**_edit(edit), "facts": torch.tensor(facts), "projected!": _edit(projected)["new!"]}


# The closed form of few steps, to which every gain is worth a move.
CLOSED = {
    "contexts": 0,
    "quantizer": "nf4+int4-g64", "null_space": 0.1, "steps": 4, "until": 0.99, "least_gain": 0.0, "neuron_share": 1.0,
    "budget": 0.1, "fisher": True, "fisher_sequences": 3,
}  # fmt: skip


def closed_task(task: mtl.data.Task) -> mtl.data.Task:
    """With text enough for a null space."""
    drawn = torch.randint(3, 60, (12, 8), generator=torch.Generator().manual_seed(1))
    return replace(task, retain_text=task.retain_text.joined(mtl.data.Sequences(drawn, torch.full((12,), 8))))


def _closed(c: Case) -> Numbers:
    edit = mtl.unlearn(c.model, closed_task(c.task), "mansu-closed", circuit=c.circuit, **CLOSED)
    assert edit.n_weights > 50
    shifts = [row["shift"] for row in edit.history if "shift" in row]
    facts = [float(edit.facts[key]) for key in ("retain_loss_before", "candidates")]
    moved = torch.tensor([list(row.values()) for row in edit.history if "layer" in row])
    return {**_edit(edit), "shift": torch.tensor(shifts), "facts": torch.tensor(facts), "layers!": moved}


def _baselines(c: Case) -> Numbers:
    out = {}
    for name in BASELINES:
        further = {"leak": 0.3} if name == "null-space" else {"share": 0.3} if name == "sure" else {}
        edit = mtl.unlearn(c.model, c.task, name, max_steps=3, stop_over_chance=-1e3, learning_rate=1e-3, **further)
        assert edit.n_weights
        out |= {f"{name} {key}": value for key, value in _edit(edit).items()}
    trial = judge(c.model, c.task, c.edit, 0.1)
    return {**out, "judged": torch.tensor([trial.forget, trial.drop])}


def _quantizers(c: Case) -> Numbers:
    out, linear, live = {}, linear_weights(c.model), parameters(c.model)
    weights = torch.cat([live[name].detach().flatten().double().cpu() for name in linear])
    # Blocks that end with the row do not fit every matrix of a model this small.
    rowwise = [name for name in mtl.quantization.quantizers("grid") if not _takes_any_row(name)]
    rowwise += [name for name in mtl.quantization.quantizers("searched") if name != "gguf-q4_k_m"]
    like = next(iter(live.values()))
    wide = (torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) / 50).to(like.device, like.dtype)
    out |= {name: quantizer(name).roundtrip(wide).flatten().double().cpu() for name in rowwise}
    others = (name for name in mtl.quantization.quantizers() if not name.startswith("gguf") and name not in rowwise)
    for name in others:
        values = quantized_values(c.model, name, calibration=c.task.retain_text)
        found = torch.cat([value.flatten().double().cpu() for value in values.values()])
        # Codes of the others hang on sums over a text, on a library's own kernels, or on 8-bit scales of scales.
        exact = name in mtl.quantization.quantizers("grid") and not name.endswith("-dq")
        out[name if exact else f"{name}!"] = found
        out[f"{name} error"] = (found - weights).norm() / weights.norm()
    twin = mtl.quantize(c.model, "nf4")
    return {**out, "twin": mtl.accuracy(twin, c.task.questions["forget"]).log_odds}


def _takes_any_row(name: str) -> bool:
    try:
        quantizer(name).roundtrip(torch.zeros(2, 72))
    except mtl.MansuError:
        return False
    return True


def _updates(c: Case) -> Numbers:
    statistics = mtl.quantization.update_statistics(c.model, c.edited)
    shaken = dither(c.model, sizes=(0.1, 0.6), residence=(0.0, 1.0))
    return {
        "codes": statistics.codes_changed, "positions": statistics.position_counts, "flips": shaken.flips,
        "inner": shaken.inner,
    }  # fmt: skip


def _certificate(c: Case) -> Numbers:
    with TemporaryDirectory() as folder:
        before, after = mtl.save(c.model, Path(folder, "a")), mtl.save(c.edited, Path(folder, "b"))
        found = certify(before, after, c.edit.indices)
        again = mtl.load(after)
    assert found.passed, found.faults
    assert fingerprint(again) == fingerprint(c.edited)
    assert fingerprint(c.edit.revert(c.edited)) == fingerprint(c.model)
    return {"edited": torch.tensor([found.n_edited, found.unedited_codes_changed])}


def _divergence(c: Case) -> Numbers:
    pairs, before = c.task.forget_pairs, circuit_scores(c.model, c.circuit, c.task.forget_pairs, steps=2)
    cad = mtl.circuit_divergence(before, c.edited, c.circuit, pairs, steps=2)
    again = rediscover(c.model, c.edited, c.circuit, pairs, steps=1)
    card = mtl.scorecard(c.model, c.edited, c.task, c.circuit, quantizers=["nf4"], original_scores=before)
    return {
        "cad": torch.tensor([cad.value, cad.mass_loss, *cad.interval]), "effects": again.effects,
        "card!": torch.tensor([row.value for row in card.rows]),
    }  # fmt: skip


def _erasure(c: Case) -> Numbers:
    task = c.task
    attack = attack_splits(task, 1, 1)[0]
    curve = relearn(c.edited, attack, steps=2, batch_size=4)
    text = relearn(c.edited, unrelated_attack(task), steps=1, batch_size=4)
    probes = probe(c.edited, task.questions["forget"], also_train=task.questions["retain"], folds=2, shuffles=1)
    depth = erasure_depth(c.model, c.edited, c.never, task.forget_pairs, threshold=0.0)
    audit = damage(c.model, c.edited, {"retain": task.retain_text}, prompts=task.unseen, max_new_tokens=2)
    return {
        "relearning": curve.values[2], "prior": curve.prior[2], "loss": curve.loss, "text": text.loss,
        "probes!": probes.penalties, "depth": torch.stack([depth.never, depth.edited]),
        "damage": torch.tensor(audit.loss[["before", "after"]].to_numpy()),
        "activations": torch.tensor(audit.activations.drop(columns=["text", "layer"]).to_numpy()),
    }  # fmt: skip


def _explorer(c: Case) -> Numbers:
    results = Explorer(c.model, c.task, c.edit, circuit=c.circuit, steps=1).results
    stage, name = (c.edit.method, "nf4"), next(iter(c.edit.indices))
    parts = results.parts(("L0H0", "L1H0.q"))
    assert bool((results.held(parts[0]) & results.edited(c.edit.method, parts[0].piece.parameter)).any())
    return {
        "answers": results.answers(stage).probability, "pattern": results.pattern(stage, 0, "L1H1"),
        "matrix": results.matrix(c.edit.method, name), "scores": results.scores(stage),
    }  # fmt: skip


# How far numbers may lie apart that two devices compute in one dtype, as a share of the largest of their tensor: scores
# and metrics add up hundreds of products in another order.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def largest_difference(found: Numbers, expected: Numbers) -> tuple[float, str]:
    """The largest difference of two devices' numbers, as a share of the largest of its tensor; and where it is."""
    worst = 0.0, ""
    for key, wanted in expected.items():
        if "!" in key:
            continue
        a, b = found[key].double().nan_to_num(nan=1e9), wanted.double().nan_to_num(nan=1e9)
        if a.shape != b.shape:
            return float("inf"), key
        scale = max(b.abs().max().item(), 1e-6) if b.numel() else 1.0
        worst = max(worst, ((a - b).abs().max().item() / scale if b.numel() else 0.0, key))
    return worst


def _several_tokens(c: Case) -> Numbers:
    """Answers of two tokens, and of a corruption that makes no prompt."""
    pairs = c.task.forget_pairs
    behind = torch.where(torch.arange(4) % 2 == 0, 9, -1).view(1, 4, 1).expand(len(pairs), -1, -1)
    pairs = replace(pairs, options=torch.cat([pairs.options, behind], -1))
    places = torch.ones(len(pairs), dtype=torch.long)
    noised = replace(
        pairs,
        corrupt=pairs.clean,
        spans=(mtl.data.Span("subject", places, places + 1),),
        corruption=mtl.data.EmbeddingCorruption("noise", (5, 6, 7)),
    )
    task = replace(c.task, forget_pairs=pairs, questions={
        **c.task.questions, "forget": mtl.data.Questions.of_pairs(pairs), "retain": c.task.questions["retain"],
    })  # fmt: skip
    curve = relearn(c.model, attack_splits(task, 1, 1)[0], steps=1, batch_size=4)
    edit = mtl.unlearn(c.model, task, "npo", max_steps=2, stop_over_chance=-1e3)
    masks = c.circuit.mask[None].float()
    return {
        "accuracy": mtl.accuracy(c.model, task.questions["forget"]).log_odds,
        "edges": mtl.edge_attribution(c.model, pairs, steps=2, per_position="end").tensor,
        "noise": mtl.edge_attribution(c.model, noised, steps=2).tensor,
        "patched": mtl.circuit.patch_edges(c.model, noised, masks),
        "sweep": mtl.activation_patching(c.model, pairs).tensor,
        "nodes": mtl.patching.node_attribution(c.model, noised, qk_fix=True).tensor,
        "depth": erasure_depth(c.model, c.edited, c.never, pairs, threshold=-1e3).edited,
        "prior": curve.prior,
        "npo!": torch.cat([edit.new[name].float() for name in sorted(edit.new)]).cpu(),
    }


STAGES: Mapping[str, Callable[[Case], Numbers]] = {
    "accuracy": _accuracy,
    "edge scores": _edges,
    "node and neuron scores": _nodes,
    "patching sweeps": _sweeps,
    "circuits": _circuits,
    "MANSU": _mansu,
    "MANSU, closed form": _closed,
    "baselines": _baselines,
    "quantizers": _quantizers,
    "update statistics": _updates,
    "certificate": _certificate,
    "CAD and scorecard": _divergence,
    "relearning, probes, depth, damage": _erasure,
    "explorer": _explorer,
    "several tokens": _several_tokens,
}


def _relearning(c: Case) -> object:
    return relearn(c.model, attack_splits(c.task, 1, 1)[0], steps=1, batch_size=4)


def _unlearn(method: str, **settings: object) -> Callable[[Case], object]:
    def run(c: Case) -> object:
        circuit = {"circuit": c.circuit} if method == "mansu" else {"stop_over_chance": -1e3, "max_steps": 2}
        return mtl.unlearn(c.model, c.task, method, **circuit, **settings)

    return run


def _scores(c: Case) -> mtl.circuit.EdgeScores:
    """Scores that need no run."""
    names = Graph.of(c.model)
    return mtl.circuit.EdgeScores(
        c.circuit.scores, names.writers, names.readers, names.exists, "eap", "clean", 1, "m", 1.0, 0.0, 0.0, "model"
    )


def _soft_prompt(c: Case) -> SoftPrompt:
    return soft_prompt(c.model, c.task.questions["forget"], tokens=1, steps=2, batch_size=4)


def _suffix(c: Case) -> AdversarialSuffix:
    return adversarial_suffix(c.model, c.task.questions["forget"], tokens=1, steps=2, candidates=4, batch_size=4)


_ASKED = tuple(Item(f"w{i} w7", f"w{i + 5} w6", perturbed_answers=("w9 w8", "w3 w4")) for i in range(10, 13))
_CHOICES = [Choice("a", "w5 w6", ("w7", "w8", "w9", "w10"), 2), Choice("b", "w9", ("w5", "w6", "w7", "w8"), 0)]
_LETTERS = lettered_tokenizer()
_REQUESTS = [Request("a", "r", "w5", "w5 w20", "w6", "w7 w9", ("w30 w5 w20",), ("w11 w20",))]
_LUME = [LumeItem(str(i), str(i), kind, "Task1", f"w{i} w7", "w9 w6") for i, kind in enumerate(("sc", "qa", "qa"))]
# Every public function that runs a model or makes one of it, by the name of the function; what it does is looked at in
# the stages and in the tests of its room. "function: how" are further ways of one function.
FUNCTIONS: Mapping[str, Callable[[Case], object]] = {
    "accuracy": lambda c: mtl.accuracy(c.model, c.task.questions["forget"]),
    "edge_attribution": lambda c: mtl.edge_attribution(c.model, c.task.forget_pairs, steps=1),
    "node_attribution": lambda c: mtl.patching.node_attribution(c.model, c.task.forget_pairs, qk_fix=True),
    "neuron_attribution": lambda c: mtl.patching.neuron_attribution(c.model, c.task.forget_pairs),
    "activation_patching": lambda c: mtl.activation_patching(c.model, c.task.forget_pairs, component="z"),
    "ablation": lambda c: mtl.runs.ablation(c.model, "mean", reference=c.task.retain_text),
    "discover_circuit": lambda c: mtl.discover_circuit(c.model, c.task.forget_pairs, faithfulness=0.3, steps=1),
    "faithfulness": lambda c: mtl.circuit.faithfulness(c.model, c.circuit, c.task.forget_pairs),
    "completeness": lambda c: mtl.circuit.completeness(c.model, c.circuit, c.task.forget_pairs),
    "minimality": lambda c: mtl.circuit.minimality(c.model, c.circuit, c.task.forget_pairs),
    "random_faithfulness": lambda c: mtl.circuit.random_faithfulness(c.model, c.circuit, c.task.forget_pairs, seeds=1),
    "faithfulness_curve": lambda c: mtl.circuit.faithfulness_curve(
        c.model, _scores(c), c.task.forget_pairs, [20], control_seeds=1
    ),
    "patch_edges": lambda c: mtl.circuit.patch_edges(c.model, c.task.forget_pairs, c.circuit.mask[None].float()),
    "patched_logits": lambda c: mtl.circuit.patched_logits(c.model, c.task.forget_pairs, c.circuit.mask[None].float()),
    "path_patching": lambda c: mtl.circuit.path_patching(c.model, c.task.forget_pairs, c.circuit.edges[:1]),
    "circuit_scores": lambda c: circuit_scores(c.model, c.circuit, c.task.forget_pairs, steps=1),
    "circuit_divergence": lambda c: mtl.circuit_divergence(c.model, c.edited, c.circuit, c.task.forget_pairs, steps=1),
    "rediscover": lambda c: rediscover(c.model, c.edited, c.circuit, c.task.forget_pairs, steps=1),
    "scorecard": lambda c: mtl.scorecard(c.model, c.edited, c.task, c.circuit, quantizers=["nf4"]),
    "unlearn": _unlearn("mansu", **MANSU),
    "unlearn: projector": _unlearn("mansu", **{**MANSU, "projector": True, "leak": 0.3}),
    "unlearn: npo": _unlearn("npo"),
    "unlearn: rmu": _unlearn("rmu"),
    "unlearn: sure": _unlearn("sure", share=0.3),
    "unlearn: ste": _unlearn("ste"),
    "unlearn: lora": _unlearn("lora", rank=2),
    "unlearn: null-space": _unlearn("null-space", leak=0.3),
    "relearn": _relearning,
    "compare_relearning": lambda c: compare_relearning(
        {"model": c.model}, attack_splits(c.task, 1, 1), learning_rates=(1e-3,), steps=1, batch_size=4
    ),
    "relearning_budgets": lambda c: relearning_budgets(
        {"model": c.model}, c.task, BudgetPlan((1,), ("near facts",), (1e-3,), (1,), (0, 2)), batch_size=4
    ),
    "leak_at_k": lambda c: leak_at_k(c.model, c.task.questions["forget"], samples=20),
    "memorisation": lambda c: memorisation(c.model, c.task.questions["forget"], whole=True),
    "membership": lambda c: membership(c.model, c.task.questions["forget"], c.task.questions["retain"]),
    "logit_lens": lambda c: logit_lens(c.model, c.task.questions["forget"]),
    "hints": lambda c: hints(c.model, c.task, examples=1, separator="w8"),
    "soft_prompt": _soft_prompt,
    "adversarial_suffix": _suffix,
    "ask_behind": lambda c: ask_behind(_soft_prompt(replace(c, model=c.never)), c.model, c.task.questions["forget"]),
    "probe": lambda c: probe(c.model, c.task.questions["forget"], folds=2, shuffles=1),
    "erasure_depth": lambda c: erasure_depth(c.model, c.edited, c.never, c.task.forget_pairs, threshold=0.0),
    "measure": lambda c: measure(Subject(c.model, c.task, c.circuit), Subject(c.edited, c.task, c.circuit), ["nf4"]),
    "evaluate_tofu": lambda c: evaluate_tofu(c.model, Tofu((), (), _ASKED, _ASKED), batch_size=4),
    "evaluate_choices": lambda c: evaluate_choices(c.model, _CHOICES, _LETTERS),
    "evaluate_counterfact": lambda c: evaluate_counterfact(c.model, _REQUESTS),
    "evaluate_lume": lambda c: evaluate_lume(c.model, _LUME[:1], _LUME[1:], new_tokens=2),
    "evaluate_muse": lambda c: evaluate_muse(c.model, {"knowmem": [MuseItem("a", "w5 w6", "w7")]}),
    "evaluate_rwku": lambda c: evaluate_rwku(c.model, {"forget": [Probe("a", "w5", "w6 ___", "w7", "1")]}, chat=False),
    "evaluate_rwku_utility": lambda c: evaluate_rwku_utility(
        c.model, [Fluency("a", "w5 w6")], chat=False, words=str.split, new_tokens=2
    ),
    "damage": lambda c: damage(c.model, c.edited, {"retain": c.task.retain_text}),
}
# The same for those that look at weights alone: hooks that are left do not enter.
OF_WEIGHTS: Mapping[str, Callable[[Case], object]] = {
    "load": lambda c: mtl.load(plain(c.model)),
    "quantize": lambda c: mtl.quantize(c.model, "nf4"),
    "quantize: calibrated": lambda c: mtl.quantize(c.model, "gptq-int4-g64", c.task.retain_text),
    "quantized_values": lambda c: quantized_values(c.model, "nf4-dq"),
    "inputs_of": lambda c: inputs_of(plain(c.model), list(linear_weights(c.model))[:1], c.task.retain_text),
    "update_statistics": lambda c: mtl.quantization.update_statistics(c.model, c.edited),
    "predicted_flips": lambda c: predicted_flips(mtl.quantization.update_statistics(c.model, c.edited)),
    "dither": lambda c: dither(c.model, sizes=(0.6,), residence=(0.0,)),
    "find_grid": lambda c: mtl.find_grid(c.model, ["nf4", "int8"]),
    "fingerprint": lambda c: fingerprint(c.model),
    "plain": lambda c: plain(c.model),
    "float32_copy": lambda c: float32_copy(c.model),
    "rebuild": lambda c: rebuild(c.model),
    "Edit.apply": lambda c: c.edit.apply(c.model),
    "Edit.revert": lambda c: c.edit.revert(c.edited),
    "certify": lambda c: sorted(_certificate(c)),
    "attack_splits": lambda c: attack_splits(c.task, 1, 2)[1].text,
    "near_attack": lambda c: near_attack(c.task).text,
    "unrelated_attack": lambda c: unrelated_attack(c.task).text,
    "random_mask": lambda c: random_mask(Graph.of(c.model).exists, 20, 0),
    "positions": lambda c: mtl.data.positions(c.task.forget_pairs, "end"),
    "load_task": lambda c: mtl.load_task("pocket"),
}
