"""The whole road in stages, on any device and in any dtype: what the device, dtype and left-state tests all walk.

A stage takes a `Case` and gives numbers, on the CPU. Numbers under a name with "!" hang on single bits (which weights an
optimisation of few steps moved): they are the same on one set of kernels and need not be on another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.models import fingerprint, plain
from mansu_tl.quantization import quantized_values
from mansu_tl.quantization.dither import dither
from mansu_tl.unlearning import Edit
from mansu_tl.unlearning.search import judge
from mansu_tl.verification import (
    attack_splits,
    certify,
    circuit_scores,
    damage,
    erasure_depth,
    probe,
    rediscover,
    relearn,
    unrelated_attack,
)
from tests.tiny_study import crossing_edit, tiny_case

Numbers = dict[str, Tensor]
BASELINES = tuple(name for name in mtl.methods() if name not in ("mansu", "random-circuit"))
# Few steps of everything that MANSU has: floor over two grids, attacker, null space, Fisher, discovered neighbours.
MANSU = {
    "quantizer": "nf4+int4-g64", "steps": 12, "learning_rate": 0.5, "budget": 0.2, "fisher_sequences": 3,
    "fisher_budget": 1e3, "neuron_share": 1.0, "adversary_steps": 2, "discover_near": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model with everything that later stages need of earlier ones."""

    model: TransformerBridge
    task: mtl.Task
    circuit: Circuit
    edit: Edit
    edited: TransformerBridge
    never: TransformerBridge


def case(family: str = "llama", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Case:
    """A tiny random model of a family; circuit and edit are made on the CPU, the same for every device."""
    (here, task), (other, _) = tiny_case(family), tiny_case(family, seed=1)
    text = torch.randint(3, 60, (12, 8), generator=torch.Generator().manual_seed(0))
    text = mtl.Sequences(text, torch.full((12,), 8))
    near = mtl.Sequences(text.tokens[:2, :5], torch.tensor([4, 5]))
    unseen = mtl.Sequences(torch.tensor([[1, 50, 20, 30], [1, 51, 20, 31], [1, 52, 21, 32]]), torch.full((3,), 4))
    task = mtl.Task("tiny", task.forget_pairs, task.retain_pairs, text, near, unseen, task.questions)
    here = mtl.load(plain(here), tokenizer=here.tokenizer, dtype=dtype)
    circuit = Circuit.top(mtl.edge_attribution(here, task.forget_pairs, steps=1), 60)
    edit = crossing_edit(here)
    model = mtl.load(plain(here), tokenizer=here.tokenizer, device=device)
    never = mtl.load(plain(other), tokenizer=here.tokenizer, device=device, dtype=dtype)
    return Case(model, task, circuit, edit, edit.apply(model), never)


def _accuracy(c: Case) -> Numbers:
    return {name: mtl.accuracy(c.model, asked).log_odds for name, asked in c.task.questions.items()}


def _edges(c: Case) -> Numbers:
    pairs, model = c.task.forget_pairs, c.model
    full = mtl.edge_attribution(model, pairs, steps=3, per_pair=True, per_position="end")
    mean = mtl.ablation(model, "mean", reference=c.task.retain_text, per_position=True)
    averaged = mtl.edge_attribution(model, pairs, method="eap", ablation=mean)
    assert full.per_pair is not None and full.per_position is not None
    return {
        "total": full.tensor, "pairs": full.per_pair, "positions": full.per_position, "mean": averaged.tensor,
        "two ends": mtl.edge_attribution(model, pairs, method="clean-corrupted").tensor,
    }  # fmt: skip


def _nodes(c: Case) -> Numbers:
    pairs = c.task.forget_pairs
    nodes = mtl.node_attribution(c.model, pairs, qk_fix=True, per_position=True)
    neurons = mtl.neuron_attribution(c.model, pairs, steps=2, per_position="end")
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
    zero = mtl.ablation(c.model, "zero")
    return {**out, "zero": mtl.activation_patching(c.model, pairs, direction="noising", ablation=zero).tensor}


def _circuits(c: Case) -> Numbers:
    model, pairs, circuit = c.model, c.task.forget_pairs, c.circuit
    scores = mtl.edge_attribution(model, pairs, steps=1)
    mean = mtl.ablation(model, "mean", reference=pairs)
    edges = circuit.edges[:2]
    return {
        "curve": mtl.faithfulness_curve(model, scores, pairs, [5, 20, 60], control_seeds=1).faithfulness,
        "found": torch.tensor(
            [
                mtl.discover_circuit(model, pairs, scores=scores, faithfulness=0.3).faithfulness,
                mtl.faithfulness(model, circuit, pairs, ablation=mean),
                mtl.completeness(model, circuit, pairs),
                *mtl.random_faithfulness(model, circuit, pairs, seeds=2),
            ]
        ),
        "minimality": mtl.minimality(model, circuit, pairs).edge_drops,
        "paths": mtl.path_patching(model, pairs, edges).per_pair,
        "masks": mtl.patch_edges(model, pairs, torch.stack([circuit.mask, 0.5 * circuit.mask.float()])),
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
        **{**MANSU, "quantizer": "nf4", "projector": True, "leak": 0.3, "floor": "after", "fisher_budget": 0.0},
    )  # fmt: skip
    facts = [float(edit.facts[key]) for key in ("retain_loss_before", "candidates")]
    assert edit.n_weights and projected.n_weights
    return {**_edit(edit), "facts": torch.tensor(facts), "projected!": _edit(projected)["new!"]}


def _baselines(c: Case) -> Numbers:
    out = {}
    for name in BASELINES:
        further = {"leak": 0.3} if name == "null-space" else {"share": 0.3} if name == "sure" else {}
        edit = mtl.unlearn(c.model, c.task, name, max_steps=3, stop_at=-1.0, learning_rate=1e-3, **further)
        assert edit.n_weights
        out |= {f"{name} {key}": value for key, value in _edit(edit).items()}
    trial = judge(c.model, c.task, c.edit, 0.1)
    return {**out, "judged": torch.tensor([trial.forget, trial.drop])}


def _quantizers(c: Case) -> Numbers:
    out = {}
    for name in mtl.quantizers():
        values = quantized_values(c.model, name, calibration=c.task.retain_text)
        out[name] = torch.cat([value.flatten().double().cpu() for value in values.values()])
    twin = mtl.quantize(c.model, "nf4")
    return {**out, "twin": mtl.accuracy(twin, c.task.questions["forget"]).log_odds}


def _updates(c: Case) -> Numbers:
    statistics = mtl.update_statistics(c.model, c.edited)
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
        "card": torch.tensor([row.value for row in card.rows]),
    }  # fmt: skip


def _erasure(c: Case) -> Numbers:
    task = c.task
    attack = attack_splits(task, 1, 1)[0]
    curve = relearn(c.edited, attack, steps=2, batch_size=4)
    text = relearn(c.edited, unrelated_attack(task), steps=1, batch_size=4)
    probes = probe(c.edited, task.questions["forget"], also_train=task.questions["retain"], folds=2, shuffles=1)
    depth = erasure_depth(c.model, c.edited, c.never, task.forget_pairs, threshold=0.0)
    audit = damage(c.model, c.edited, {"retain": task.retain_text}, prompts=["w3 w20 w30"], max_new_tokens=2)
    return {
        "relearning": curve.values[2], "prior": curve.prior[2], "loss": curve.loss, "text": text.loss,
        "probes!": probes.penalties, "depth": torch.stack([depth.never, depth.edited]),
        "damage": torch.tensor(audit.loss[["before", "after"]].to_numpy()),
        "activations": torch.tensor(audit.activations.drop(columns=["text", "layer"]).to_numpy()),
    }  # fmt: skip


STAGES: Mapping[str, Callable[[Case], Numbers]] = {
    "accuracy": _accuracy,
    "edge scores": _edges,
    "node and neuron scores": _nodes,
    "patching sweeps": _sweeps,
    "circuits": _circuits,
    "MANSU": _mansu,
    "baselines": _baselines,
    "quantizers": _quantizers,
    "update statistics": _updates,
    "certificate": _certificate,
    "CAD and scorecard": _divergence,
    "relearning, probes, depth, damage": _erasure,
}
