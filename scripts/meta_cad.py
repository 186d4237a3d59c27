"""Which score tells erased from suppressed? `python scripts/meta_cad.py --out figures/tables/meta_cad.csv`

Models whose truth is known, all on one basis. The ancestor is `pocket-never`, which knows the world but no forget fact; the
original is the ancestor fine-tuned on the forget facts; "never" is the ancestor fine-tuned for as long on text alone (two of
them, and a third that scores take as their reference); "partly" learnt only a share of the facts. Suppressors are the
original whose MLP output of one layer (first, middle, last) was trained against the answers, retain text held; the filter is
the original behind a logit filter; "damaged" is the original with noise on every weight; "intact" is the original trained on
retain text. Everything is made anew for every seed.

A score is to be 0 where the knowledge is there and 1 where it is not. AUC is of the pool where it is there (intact, filter,
suppressors) against the pool where it is not (never), over all seeds. After UDS (arXiv 2605.24614): Q is how far a score
moves under NF4, R how far it moves when a model is trained on unrelated text, both as a mean over models.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.data import PromptPairs, Sequences, Task
from mansu_tl.models import Anatomy, linear_weights, parameters, plain, rebuild
from mansu_tl.runs import answer_log_prob
from mansu_tl.runs.streams import residual_streams
from mansu_tl.unlearning.batches import Sampler
from mansu_tl.unlearning.retain_statistics import sequence_loss
from mansu_tl.verification import CadByDepth, DepthReader, circuit_divergence, circuit_scores, erasure_depth, probe

LEARN, SUPPRESS, TEXT, BATCH, LEAST, NOISE = 240, 80, 60, 32, -12.0, 1.2
SHARES = (0.25, 0.5, 0.75)
PRESENT = ("intact", "filter", "suppressor, first", "suppressor, middle", "suppressor, last")
ABSENT = ("never, 1", "never, 2")
SCORES = (
    "CAD by depth",
    "specificity",
    "edge by edge",
    "behavioural CAD",
    "depth",
    "UDS",
    "logit lens",
    "probe",
    "answers",
)
SHOWN = ("CAD by depth", "specificity", "added opposition", "behavioural CAD", "depth", "UDS")


def trained(
    model: TransformerBridge, task: Task, seed: int, steps: int, rate: float, *,
    learn: PromptPairs | None = None, against: PromptPairs | None = None, only: str = "",
) -> TransformerBridge:  # fmt: skip
    """The model after some steps on retain text, with the answers of some pairs learnt or spoken against.

    Args:
        only: the one parameter that is trained; all where not given.
    """
    hf, draw = plain(model), torch.Generator().manual_seed(seed)
    values = {n: p.detach().clone().requires_grad_(not only or n == only) for n, p in hf.named_parameters()}
    moving = {n: p for n, p in values.items() if p.requires_grad}
    adam = torch.optim.Adam(moving.values(), lr=rate)
    text, pairs = Sampler(len(task.retain_text), BATCH, draw), learn if learn is not None else against
    rows = None if pairs is None else Sampler(len(pairs), BATCH, draw)
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10, 2 * (steps - step) / steps)
        loss = sequence_loss(hf, values, task.retain_text[text()])
        if pairs is not None and rows is not None:
            some = pairs[rows()]
            logits = torch.func.functional_call(hf, values, (some.clean,)).logits
            each = logits[torch.arange(len(some)), some.lengths - 1].log_softmax(-1)
            each = each[torch.arange(len(some)), some.answers]
            loss = loss - each.mean() if learn is not None else loss + each.clamp_min(LEAST).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return rebuild(model, {n: p.detach() for n, p in moving.items()})


def family(ancestor: TransformerBridge, task: Task, seed: int) -> Iterator[tuple[str, float, TransformerBridge]]:
    """Name, share of the facts that are absent, and the model; the original first."""
    facts = list(dict.fromkeys(task.forget_pairs.facts))
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(seed)).tolist()
    rank = {facts[i]: place / len(facts) for place, i in enumerate(order)}

    def learnt(share: float) -> PromptPairs:
        rows = [i for i, fact in enumerate(task.forget_pairs.facts) if rank[fact] < share]
        return task.forget_pairs[rows]

    original = trained(ancestor, task, seed, LEARN, 1e-3, learn=learnt(1.0))
    yield "original", 0.0, original
    yield "intact", 0.0, trained(original, task, seed + 100, TEXT, 3e-4)
    layers = Anatomy.of(original).n_layers
    for name, layer in (("first", 0), ("middle", layers // 2), ("last", layers - 1)):
        weight = f"model.layers.{layer}.mlp.down_proj.weight"
        yield (
            f"suppressor, {name}",
            0.0,
            trained(original, task, seed + 200, SUPPRESS, 3e-3, against=task.forget_pairs, only=weight),
        )
    yield "filter", 0.0, original
    yield "reference", 1.0, trained(ancestor, task, seed + 350, LEARN, 1e-3)
    for number in range(2):
        yield f"never, {number + 1}", 1.0, trained(ancestor, task, seed + 300 + number, LEARN, 1e-3)
    for share in SHARES:
        yield (
            f"partly, {100 * share:.0f} %",
            share,
            trained(ancestor, task, seed + 400, LEARN, 1e-3, learn=learnt(1 - share)),
        )
    noise = torch.Generator().manual_seed(seed)
    damaged = {
        name: parameters(original)[name] + NOISE * parameters(original)[name].std() * torch.randn(
            parameters(original)[name].shape, generator=noise)
        for name in linear_weights(original)
    }  # fmt: skip
    yield "damaged", 0.0, rebuild(original, damaged)


def lens(model: TransformerBridge, pairs: PromptPairs) -> Tensor:
    """Share of the answers that each layer's stream, through the final norm and the head, puts first of the options."""
    hf, out, rows = plain(model), [], torch.arange(len(pairs))
    for stream in residual_streams(model, Sequences(pairs.clean, pairs.lengths))[0]:
        with torch.no_grad():
            logits = hf.lm_head(hf.model.norm(stream[rows, pairs.lengths - 1]))
        scores = logits.gather(1, pairs.options[:, :, 0])
        out.append((scores.argmax(1) == 0).double().mean())
    return torch.stack(out)


class Scores:
    """Every score of one seed's models."""

    def __init__(self, original: TransformerBridge, never: TransformerBridge, task: Task, circuit: Circuit) -> None:
        self.original, self.never, self.task, self.circuit = original, never, task, circuit
        self.pairs, near = task.forget_pairs, task.retain_pairs[: len(task.forget_pairs)]
        self.reader = DepthReader(original, self.pairs, near, circuit=circuit)
        self.own, self.lens = circuit_scores(original, circuit, self.pairs), lens(original, self.pairs)

    def of(self, model: TransformerBridge, name: str) -> tuple[dict[str, float], CadByDepth]:
        """Every score of one model, and its CAD by depth."""
        found = self.reader.read(model, label=name)
        if name == "filter":
            # The filter lowers the answers' logits: nothing inside changes, no answer is chosen.
            found = replace(found, grafted=torch.cat([found.grafted[:-1], torch.zeros_like(found.grafted[-1:])]))
        behaviour = circuit_divergence(
            self.own, circuit_scores(model, self.circuit, self.pairs), self.circuit, self.pairs
        )
        depth = erasure_depth(self.original, model, self.never, self.pairs)
        uds = erasure_depth(
            self.original, model, self.never, self.pairs, positions="last", metric=answer_log_prob, threshold=0.05
        )
        seen, here = self.lens > 0.5, lens(model, self.pairs)
        best = probe(model, self.task.questions["forget"]).right.double().mean(1).max()
        read = found.judged
        return {
            "CAD by depth": float(found.cad[read]),
            "specificity": float(found.specificity[read]),
            "edge by edge": found.edge_cad,
            "added opposition": found.opposition,
            "behavioural CAD": behaviour.value,
            "depth": depth.value,
            "UDS": uds.value,
            "logit lens": float(1 - here[seen].mean() / self.lens[seen].mean()),
            "probe": float(1 - best),
            "answers": 1 - found.answered,
        }, found


def auc(present: list[float], absent: list[float]) -> float:
    """How often a model without the knowledge scores above one with it; half for ties."""
    wins = [float(a > p) + 0.5 * float(a == p) for a in absent for p in present]
    return sum(wins) / len(wins)


def by_score(table: pd.DataFrame) -> pd.DataFrame:
    """One row a score: how well it tells the two pools apart, and how little it moves."""
    now, rows = table[table.form == ""], []
    partly = now[now.model.str.startswith(("intact", "partly", "never"))]
    for score in SCORES:
        absent, present = (now[now.model.isin(pool)][score].tolist() for pool in (ABSENT, PRESENT))
        deeper = now[now.model.isin(PRESENT) & (now.model != "suppressor, first")][score].tolist()
        wide = table.pivot(index=["seed", "model"], columns="form", values=score)
        rows.append({
            "score": score, "AUC": auc(present, absent), "AUC without the first layer's": auc(deeper, absent),
            "largest where it is there": max(deeper), "smallest where it is not": min(absent),
            "rank correlation": partly[score].corr(partly.absent, method="spearman"),
            "Q": (wide["nf4"] - wide[""]).abs().mean(), "R": (wide["trained on text"] - wide[""]).abs().mean(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def by_model(table: pd.DataFrame) -> pd.DataFrame:
    """One row a kind of model: forget answers chosen, the verdicts of all seeds, and scores, means over seeds."""
    now, rows = table[table.form == ""], []
    for name, each in now.groupby("model", sort=False):
        verdicts = each.verdict.value_counts()
        named = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.items())
        rows.append({"model": name, "forget MC, %": f"{each.forget_mc.mean():.0f}", "verdicts": named,
                     **{score: f"{each[score].mean():.2f}" for score in SHOWN}})  # fmt: skip
    return pd.DataFrame(rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start, rows = time.monotonic(), []
    ancestor, task = mtl.load("pocket-never"), mtl.load_task("pocket")
    for seed in range(options.seeds):
        made = list(family(ancestor, task, seed))
        models = {name: model for name, _, model in made}
        original = models.pop("original")
        circuit = mtl.discover_circuit(original, task.forget_pairs, faithfulness=0.85)
        scores = Scores(original, models.pop("reference"), task, circuit)
        later: dict[str, Callable[[TransformerBridge], TransformerBridge]] = {
            "": lambda model: model,
            "nf4": lambda model: mtl.quantize(model, "nf4"),
            "trained on text": lambda model, seed=seed: trained(model, task, seed + 500, 20, 3e-4),  # type: ignore[misc]
        }
        for name, absent, model in (each for each in made if each[0] in models):
            for form, change in later.items():
                changed = change(model)
                values, found = scores.of(changed, name)
                # Behind the filter no answer is chosen.
                mc = mtl.accuracy(changed, task.questions["forget"]).mc_percent if name != "filter" else 0.0
                verdict = found.verdict().name
                rows.append(
                    {
                        "seed": seed,
                        "model": name,
                        "form": form,
                        "absent": absent,
                        "verdict": verdict,
                        "forget_mc": mc,
                        **values,
                    }
                )
            print(f"{time.monotonic() - start:6.0f} s  seed {seed}  {name}: {rows[-3]}", flush=True)
        pd.DataFrame(rows).to_csv(options.out, index=False, float_format="%.4f")
    table = pd.DataFrame(rows)
    for found in (by_score(table), by_model(table)):
        print(found.round(3).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
