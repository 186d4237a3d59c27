"""TOFU on a small model: forgetting by TOFU's own measures, before and after quantization, against the retain model.

    python tests/benchmarks/tofu.py --data ../shared/data/tofu --out runs/tofu --methods mansu,graddiff,npo \
        --quantizers nf4 --seeds 0

Trains the two models (about 11 minutes of one core each) or takes those already under `--out`, discovers the circuit,
unlearns, evaluates. Every method and seed is written when it is done and is skipped by the next run, so an interrupted
run goes on. Learning rates are chosen on a validation split of the forget questions (`--rates`, the same for all gradient
baselines); reported are the questions of the other side, and TOFU's own sets.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import mansu_tl as mtl
from mansu_tl.data.split import split_questions
from mansu_tl.files import write_text
from mansu_tl.tofu import TofuScores, evaluate_tofu, read_tofu, tofu_task
from mansu_tl.tofu.train import CHECKPOINTS, train_tofu
from mansu_tl.unlearning import MansuSettings
from mansu_tl.unlearning.search import search
from mansu_tl.verification import circuit_scores

# What `--tune` tries for MANSU: its defaults, more weights, and a weaker hold on what is kept.
MANSU: tuple[dict[str, Any], ...] = (
    {},
    {"budget": 0.05},
    {"budget": 0.05, "retain_weight": 5.0, "near_weight": 3.0},
)
CIRCUIT_PAIRS = 96
_SHOWN = {
    ("forget", "probability"): "forget prob.",
    ("forget", "rouge"): "forget ROUGE-L",
    ("forget", "extraction"): "extraction",
    ("forget", "truth ratio median"): "truth ratio",
    ("all", "forget quality"): "forget quality",
    ("retain", "probability"): "retain prob.",
    ("retain", "rouge"): "retain ROUGE-L",
    ("all", "retain utility"): "retain utility",
    ("all", "model utility"): "model utility",
    ("forget", "MC"): "forget MC",
    ("forget", "cloze"): "forget cloze",
    ("retain", "cloze"): "retain cloze",
    ("near", "cloze"): "near cloze",
    ("circuit", "CAD"): "CAD",
    ("edit", "linear weights, %"): "edited %",
    ("edit", "seconds"): "s",
}


class Run:
    """Everything that the methods share; each part is computed when first needed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out)

    @cached_property
    def models(self) -> dict[str, Path]:
        """The model folders, trained if they are not there."""
        folders = {name: Path(self.options.models or self.out / "models") / name for name in CHECKPOINTS}
        for name, folder in folders.items():
            if not (folder / "training.json").is_file():
                train_tofu(self.options.data, folder.parent, name)
        return folders

    @cached_property
    def model(self) -> Any:
        """The model that read everything."""
        return mtl.load(self.models["tofu-full"])

    @cached_property
    def tofu(self) -> Any:
        """TOFU's files."""
        return read_tofu(self.options.data)

    @cached_property
    def tasks(self) -> tuple[Any, Any]:
        """The task with the validation questions, and with the test questions."""
        task = tofu_task(self.options.data, self.model, near=self.options.near, per_answer=self.options.per_answer)
        validation, test = split_questions(task)
        return validation, test

    @cached_property
    def pairs(self) -> Any:
        """Forget pairs for attribution, evenly spread."""
        pairs = self.tasks[0].forget_pairs
        count = min(CIRCUIT_PAIRS, len(pairs))
        return pairs[[i * len(pairs) // count for i in range(count)]]

    @cached_property
    def circuit(self) -> Any:
        """The forget circuit, kept on disk."""
        path = self.out / "circuit.safetensors"
        if not path.is_file():
            started = time.perf_counter()
            mtl.discover_circuit(self.model, self.pairs, progress=True).save(path)
            print(f"circuit: {time.perf_counter() - started:.0f} s")
        return mtl.Circuit.load(path)

    @cached_property
    def before(self) -> Any:
        """The un-edited model's circuit scores."""
        return circuit_scores(self.model, self.circuit, self.pairs)

    @cached_property
    def reference(self) -> dict[str, TofuScores]:
        """The retain model's scores by quantizer; forget quality compares like with like."""
        return {name: self.scored("retain model", mtl.load(self.models["tofu-retain"]), name) for name in self.views}

    @property
    def views(self) -> list[str]:
        """Full precision, then the quantizers."""
        return ["", *self.options.quantizers]

    def deployed(self, model: Any, view: str) -> Any:
        """The model under a quantizer."""
        return mtl.quantize(model, view, self.tasks[1].retain_text) if view else model

    def scored(self, title: str, model: Any, view: str) -> TofuScores:
        """TOFU's measures, kept on disk."""
        path = self.out / "scores" / f"{title.replace(' ', '-')}{'-' + view if view else ''}.safetensors"
        if not path.is_file():
            found = evaluate_tofu(self.deployed(model, view), self.tofu, title=title, limit=self.options.limit)
            found.save(path)
        return TofuScores.load(path)

    def measured(self, title: str, model: Any) -> Iterator[tuple[str, str, str, float]]:
        """Rows quantizer, set, measure, value."""
        for view in self.views:
            deployed = self.deployed(model, view)
            frame = self.scored(title, model, view).to_dataframe(self.reference[view])
            for name, measure, value in zip(frame["set"], frame["measure"], frame["value"], strict=True):
                yield view, str(name), str(measure), float(value)
            for name, questions in self.tasks[1].questions.items():
                found = mtl.accuracy(deployed, questions)
                yield view, name, "MC", found.mc_percent
                yield view, name, "cloze", found.cloze_percent
                yield view, name, "log-odds", found.log_odds.mean().item()
            cad = mtl.circuit_divergence(self.before, deployed, self.circuit, self.pairs)
            yield view, "circuit", "CAD", cad.value

    def unlearned(self, method: str, seed: int) -> Iterator[tuple[str, str, str, float]]:
        """Unlearn and measure."""
        validation, _ = self.tasks
        given = _settings(self.options.set, method)
        circuit = self.circuit if method in ("mansu", "random-circuit") else None
        if method == "mansu" and self.options.tune:
            given |= self.tuned(seed, given)
            yield "", "edit", "budget", given.get("budget", float("nan"))
        elif circuit is None and self.options.rates and "learning_rate" not in given:
            found = search(self.model, validation, method, rates=self.options.rates, seed=seed, progress=True, **given)
            found.save(self.out / "searches" / f"{method}-{seed}.safetensors")
            given["learning_rate"] = found.best.rate
            yield "", "edit", "learning rate", found.best.rate
        started = time.perf_counter()
        edit = mtl.unlearn(self.model, validation, method, circuit=circuit, seed=seed, progress=True, **given)
        yield "", "edit", "seconds", time.perf_counter() - started
        edit.save(self.out / "edits" / f"{method}-{seed}.safetensors")
        yield "", "edit", "linear weights, %", 100 * edit.linear_share(self.model)
        yield from self.measured(f"{method} {seed}", edit.apply(self.model))

    def tuned(self, seed: int, given: dict[str, Any]) -> dict[str, Any]:
        """The settings of `MANSU` that do best on the validation questions, by the rule of `search`."""
        rows, rate = [], given.get("learning_rate", MansuSettings.learning_rate)
        for values in MANSU:
            tried = {key: value for key, value in {**values, **given}.items() if key != "learning_rate"}
            found = search(
                self.model,
                self.tasks[0],
                "mansu",
                rates=[rate],
                circuit=self.circuit,
                seed=seed,
                progress=True,
                **tried,
            )
            rows.append({"settings": tried, **found.to_dataframe().iloc[0].to_dict()})
            write_text(self.out / "searches" / f"mansu-{seed}.csv", pd.DataFrame(rows).to_csv(index=False))
        best = min(rows, key=lambda row: (not row["reached"], row["drop"] if row["reached"] else row["forget"]))
        return dict(best["settings"])

    def table(self) -> pd.DataFrame:
        """All rows: method, seed, quantizer, set, measure, value."""
        jobs: list[tuple[str, int]] = [("un-edited", 0), ("retain model", 0)]
        jobs += [(method, seed) for method in self.options.methods for seed in self.options.seeds]
        frames = []
        for method, seed in jobs:
            path = self.out / "rows" / f"{method.replace(' ', '-')}-{seed}.csv"
            if not path.is_file():
                if method == "un-edited":
                    rows = self.measured(method, self.model)
                elif method == "retain model":
                    rows = self.measured(method, mtl.load(self.models["tofu-retain"]))
                else:
                    rows = self.unlearned(method, seed)
                frame = pd.DataFrame(rows, columns=["quantizer", "set", "measure", "value"])
                frame.insert(0, "seed", seed)
                frame.insert(0, "method", method)
                write_text(path, frame.to_csv(index=False))
            frames.append(pd.read_csv(path).fillna({"quantizer": ""}))
        return pd.concat(frames, ignore_index=True)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table that README prints: means over seeds, one row a method and quantizer."""
    keys = [(a, b) in _SHOWN for a, b in zip(table["set"], table["measure"], strict=True)]
    part = table[keys].assign(column=lambda f: [_SHOWN[k] for k in zip(f["set"], f["measure"], strict=True)])
    wide = part.pivot_table(index=["method", "quantizer"], columns="column", values="value", sort=False)
    return wide[[name for name in _SHOWN.values() if name in wide]]


def _settings(given: Sequence[str], method: str) -> dict[str, Any]:
    """Of `method.key=value` those for one method; numbers as numbers."""
    found: dict[str, Any] = {}
    for text in given:
        key, _, value = text.partition("=")
        owner, _, name = key.partition(".")
        if owner == method:
            found[name] = float(value) if value.replace(".", "").replace("e-", "").isdigit() else value
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with TOFU's files")
    parser.add_argument("--out", required=True, help="folder for models, edits, scores and tofu.csv")
    parser.add_argument("--models", default="", help="folder with the model folders, if not OUT/models")
    parser.add_argument("--methods", type=lambda t: t.split(","), default=["mansu", "graddiff", "npo"])
    parser.add_argument("--quantizers", type=lambda t: t.split(","), default=["nf4"])
    parser.add_argument("--seeds", type=lambda t: [int(s) for s in t.split(",")], default=[0])
    parser.add_argument("--rates", type=lambda t: [float(r) for r in t.split(",") if r], default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--set", action="append", default=[], help="a setting, e.g. mansu.budget=0.05")
    parser.add_argument("--limit", type=int, default=0, help="questions of each TOFU set at most; 0 = all")
    parser.add_argument("--near", type=int, default=400, help="retain questions that count as near")
    parser.add_argument("--per-answer", type=int, default=2, help="places of a forget answer that are unlearned")
    parser.add_argument("--tune", action="store_true", help="choose MANSU's settings on the validation questions")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = Run(options).table()
    write_text(Path(options.out) / "tofu.csv", table.to_csv(index=False))
    print(shown(table).round(3).to_string())


if __name__ == "__main__":
    main()
