"""Extraction and membership on a study's edits: `python scripts/extraction.py RUN --out figures/tables/extraction.csv`.

RUN is the folder of `make demo` (or of `make demo-real`, or of any study). The original, every method's edit as it is and
as it is shipped, and the never-trained model where the study names one: leak@k, memorisation, hints, a soft prompt, an
adversarial suffix, membership and the logit lens, one row a measure, with 95 % intervals over facts. What the table holds
already is not measured again, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

import mansu_tl as mtl
from mansu_tl.data import Task
from mansu_tl.results.intervals import with_interval
from mansu_tl.study.config import tomllib
from mansu_tl.unlearning import Edit
from mansu_tl.verification import (
    AdversarialSuffix,
    Membership,
    SoftPrompt,
    adversarial_suffix,
    ask_behind,
    hints,
    leak_at_k,
    logit_lens,
    membership,
    memorisation,
    soft_prompt,
)  # fmt: skip

TITLES = {
    "graddiff": "GradDiff",
    "npo": "NPO",
    "mansu": "MANSU",
    "mansu-closed": "MANSU, closed form",
    "quail": "QUAIL",
}
NEVER = "never trained"
SAMPLES, KS = 128, (1, 16, 128)
# Fewer candidates than the default, on more questions: two minutes a model on a core.
SUFFIX: dict[str, Any] = {"candidates": 16, "batch_size": 48, "steps": 40}
COLUMNS = ["model", "form", "attack", "measure", "value", "low", "high", "chance", "part"]
Row = dict[str, Any]
# What the page shows; the rest is in the table.
SHOWN = [
    ("plain", "MC, %"), ("plain", "cloze, %"),
    *((who, f"leak@{k}, %") for k in KS for who in ("leak", "a wrong option leaks")),
    ("sentence", "exact memorisation, %"), ("sentence", "extraction strength, %"),
    *((hint, "MC, %") for hint in (
        "other wordings", "examples, near facts", "examples, forget facts", "options named", "combined, forget",
        "combined, retain",
    )),
    ("combined, retain", "cloze, %"),
    *((f"logit lens, L{layer}", "MC, %") for layer in range(4)),
    ("soft prompt", "MC, %"), ("soft prompt", "cloze, %"), ("soft prompt, put before never trained", "MC, %"),
    ("adversarial suffix", "MC, %"), ("adversarial suffix", "cloze, %"),
    ("adversarial suffix, put before never trained", "MC, %"),
    *((f"membership{of}, {attack}", "AUC") for attack in ("LOSS", "Min-K", "Min-K++") for of in ("", " of wrong sentences")),
    *((f"membership, {attack}", "PrivLeak, %") for attack in ("LOSS", "Min-K", "Min-K++")),
]  # fmt: skip


@dataclass
class Measures:
    """What is measured of each model; what was found on the never-trained one is kept, for PrivLeak and transfer."""

    task: Task
    never: TransformerBridge | None
    reference: Membership | None = None

    def sampled(self, model: TransformerBridge) -> Iterator[Row]:
        """leak@k at temperature 1, and in the nucleus of .9."""
        for top_p in (1.0, 0.9):
            found = leak_at_k(model, self.task.questions["forget"], samples=SAMPLES, top_p=top_p)
            for row in found.to_dataframe(KS).to_dict("records"):
                for key, name in {"leak": "leak", "control": "a wrong option leaks"}.items():
                    name = name if top_p == 1 else f"{name}, top_p {top_p:g}"
                    yield _row(name, f"leak@{row['k']}, %", row[key], row[f"{key}_low"], row[f"{key}_high"])

    def memorised(self, model: TransformerBridge) -> Iterator[Row]:
        """Exact memorisation and extraction strength, of answers and of whole sentences."""
        for whole in (False, True):
            found = memorisation(model, self.task.questions["forget"], whole=whole)
            for row in found.to_dataframe().to_dict("records"):
                part = "sentence" if whole else "answer"
                yield _row(part, f"{row['measure']}, %", row["value"], row["value_low"], row["value_high"])

    def helped(self, model: TransformerBridge) -> Iterator[Row]:
        """Answers by hint."""
        for row in hints(model, self.task).to_dataframe().to_dict("records"):
            for key, name in (("multiple_choice", "MC, %"), ("cloze", "cloze, %")):
                chance = row["chance"] if key == "multiple_choice" else float("nan")
                yield _row(row["hint"], name, row[key], row[f"{key}_low"], row[f"{key}_high"], chance)

    def prompted(self, model: TransformerBridge) -> Iterator[Row]:
        """Held-out facts behind a soft prompt, and the never-trained model's answers behind the same."""
        questions = self.task.questions["forget"]
        found = soft_prompt(model, questions)
        yield from self._behind("soft prompt", found)
        if self.never is not None and model is not self.never:
            yield from self._behind("soft prompt, put before never trained", ask_behind(found, self.never, questions))

    def suffixed(self, model: TransformerBridge) -> Iterator[Row]:
        """Held-out facts with an adversarial suffix, and the never-trained model's answers with the same."""
        questions = self.task.questions["forget"]
        found = adversarial_suffix(model, questions, **SUFFIX)
        yield from self._behind("adversarial suffix", found)
        if self.never is not None and model is not self.never:
            name = "adversarial suffix, put before never trained"
            yield from self._behind(name, ask_behind(found, self.never, questions))

    def members(self, model: TransformerBridge) -> Iterator[Row]:
        """AUC of forget sentences, right and wrong ones, against sentences about never-seen names; PrivLeak."""
        if "unseen" not in self.task.questions:
            return
        forget, unseen = self.task.questions["forget"], self.task.questions["unseen"]
        wrong = replace(forget, options=forget.options.roll(-1, 1))
        for row in membership(model, wrong, unseen).to_dataframe().to_dict("records"):
            name = f"membership of wrong sentences, {row['attack']}"
            yield _row(name, "AUC", row["auc"], row["auc_low"], row["auc_high"], 0.5)
        found = membership(model, forget, unseen)
        if model is self.never:
            self.reference = found
        for row in found.to_dataframe(self.reference).to_dict("records"):
            yield _row(f"membership, {row['attack']}", "AUC", row["auc"], row["auc_low"], row["auc_high"], 0.5)
            if self.reference is not None and model is not self.never:
                ends = row["privleak"], row["privleak_low"], row["privleak_high"]
                yield _row(f"membership, {row['attack']}", "PrivLeak, %", *ends, 0.0)

    def lens(self, model: TransformerBridge) -> Iterator[Row]:
        """The logit lens layer by layer."""
        for row in logit_lens(model, self.task.questions["forget"]).to_dataframe().to_dict("records"):
            ends = (row[f"multiple_choice{end}"] for end in ("", "_low", "_high"))
            yield _row(f"logit lens, {row['layer']}", "MC, %", *ends, row["chance"])

    def _behind(self, name: str, found: SoftPrompt | AdversarialSuffix) -> Iterator[Row]:
        values = {"MC, %": found.multiple_choice, "cloze, %": found.cloze}
        for measure, right in values.items():
            ends = with_interval("v", right, found.facts, scale=100.0).values()
            yield _row(name, measure, *ends, 100 * found.chance if measure[0] == "M" else float("nan"))


PARTS: dict[str, Callable[[Measures, TransformerBridge], Iterator[Row]]] = {
    "leak": Measures.sampled, "memorisation": Measures.memorised, "hints": Measures.helped,
    "membership": Measures.members, "lens": Measures.lens, "soft-prompt": Measures.prompted,
    "suffix": Measures.suffixed,
}  # fmt: skip


def _row(attack: str, measure: str, value: float, low: float, high: float, chance: float = float("nan")) -> Row:
    return {"attack": attack, "measure": measure, "value": value, "low": low, "high": high, "chance": chance}


def models_of(run: Path, config: dict[str, Any], never: TransformerBridge | None, methods: list[str]) -> Iterator[
    tuple[str, str, TransformerBridge]
]:  # fmt: skip
    """Name, form ("" = as it is) and model; the never-trained one first, since others are set against it."""
    original = mtl.load(config["model"])
    if never is not None:
        yield NEVER, "", never
    yield "original", "", original
    for method in methods or config["methods"]:
        edited = Edit.load(run / "edits" / method / "edit.safetensors").apply(original)
        yield TITLES.get(method, method), "", edited
        file = run / "model" / f"{method}.gguf"
        if file.is_file():
            yield TITLES.get(method, method), "shipped", mtl.load(file, tokenizer=original.tokenizer)
        else:
            yield TITLES.get(method, method), "nf4", mtl.quantize(edited, "nf4")


def by_attack(table: pd.DataFrame) -> pd.DataFrame:
    """One row an attack and measure, one column a model and form: what the page shows."""
    named = table.assign(column=[f"{m}, {f}" if f else m for m, f in zip(table.model, table.form, strict=True)])
    columns = [name for name in dict.fromkeys(named.column) if name != NEVER]
    columns += [NEVER] * (NEVER in named.column.tolist())
    cells = {(row.attack, row.measure, row.column): float(row.value) for row in named.itertuples()}
    known = list(dict.fromkeys(zip(named.attack, named.measure, strict=True)))
    rows = []
    for attack, measure in (key for key in SHOWN if key in known):
        digits = 2 if measure == "AUC" else 0
        # Adding nothing to a rounded number takes a minus off zero.
        found = [cells.get((attack, measure, column)) for column in columns]
        shown = ["" if value is None else f"{round(value, digits) + 0.0:.{digits}f}" for value in found]
        rows.append([attack, measure, *shown])
    return pd.DataFrame(rows, columns=["attack", "measure", *columns])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=[], help="those of the study where not given")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--task", help="a task instead of the study's own")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.monotonic()
    config = tomllib.loads((options.run / "config.toml").read_text(encoding="utf-8"))
    never = mtl.load(config["never"]) if config.get("never") else None
    tokenizer = None if config["model"].startswith("pocket") else mtl.load(config["model"])
    task = mtl.load_task(options.task or config["task"], **({} if tokenizer is None else {"tokenizer": tokenizer}))
    measures = Measures(task, never)
    table = pd.read_csv(options.out, keep_default_na=False, na_values={"chance": [""]}) if options.out.is_file() else (
        pd.DataFrame(columns=COLUMNS))  # fmt: skip
    for name, form, model in models_of(options.run, config, never, options.methods):
        for part in options.parts:
            there = table[(table.model == name) & (table.form == form) & (table.part == part)]
            if len(there) and not (part == "membership" and model is never):
                continue
            rows = [{"model": name, "form": form, **row, "part": part} for row in PARTS[part](measures, model)]
            table = pd.concat([table.drop(there.index), pd.DataFrame(rows)], ignore_index=True)
            table.to_csv(options.out, index=False, float_format="%.4f")
            print(f"{time.monotonic() - start:6.0f} s  {name} {form} {part}: {len(rows)} rows", flush=True)
    print(by_attack(table).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
