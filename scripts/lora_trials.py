"""LoRA unlearning over its learning rate: `python scripts/lora_trials.py --out figures/tables/lora.csv`.

Four rates on `pocket`, judged on the validation part as in the comparison (`unlearning.search`: forgotten in full
precision, then the least cloze lost; quantization plays no part). One row a rate on the validation part, then one a seed of
the chosen rate on the other two thirds. Every model is asked as it is stored and under two 4-bit grids.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

import mansu_tl as mtl
from mansu_tl.data import Task
from mansu_tl.data.split import split_questions
from mansu_tl.quantization import update_statistics
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.unlearning import Edit
from mansu_tl.unlearning.search import Search, judge

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
GRIDS = {"NF4": "nf4", "int4-g64": "int4-g64"}


def row(model: TransformerBridge, edited: TransformerBridge, part: str, task: Task) -> dict[str, str]:
    """What one edited model answers of one part of the questions."""
    forms = {"": edited, **{f" after {name}": mtl.quantize(edited, grid) for name, grid in GRIDS.items()}}
    found = {"part": part}
    for form, each in forms.items():
        answers = mtl.accuracy(each, task.questions["forget"])
        low, high = (100 * end for end in interval_over_facts(answers.multiple_choice.double(), answers.facts))
        found[f"forget MC{form}"] = f"{answers.mc_percent:.1f} [{low:.1f}, {high:.1f}]"
        if form in ("", " after NF4"):
            found[f"cloze{form}"] = f"{answers.cloze_percent:.1f}"
    for name in ("retain", "near"):
        before, after = (mtl.accuracy(each, task.questions[f"{name}_paraphrase"]) for each in (model, edited))
        found[f"{name} drop, held out"] = f"{before.cloze_percent - after.cloze_percent:.1f}"
    flips = update_statistics(model, edited, "nf4")
    share = (flips.codes_changed + flips.untouched_codes_changed).sum() / flips.weights.sum()
    found["NF4 codes changed, %"] = f"{100 * share.item():.1f}"
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES))
    parser.add_argument("--seeds", type=int, default=3, help="of the chosen rate")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.monotonic()
    model, (validation, test) = mtl.load("pocket"), split_questions(mtl.load_task("pocket"))
    rows, trials, edits = [], [], {}

    def made(rate: float, seed: int) -> Edit:
        edit = mtl.unlearn(model, validation, "lora", learning_rate=rate, seed=seed, max_steps=options.steps)
        print(f"{time.monotonic() - start:6.0f} s  rate {rate:g}, seed {seed}: {edit.facts['steps']} steps", flush=True)
        return edit

    def kept(rate: float, seed: int, edit: Edit, part: str, task: Task) -> None:
        rows.append({"rate": f"{rate:g}", "seed": str(seed), "steps": str(edit.facts["steps"])}
                    | row(model, edit.apply(model), part, task))  # fmt: skip
        pd.DataFrame(rows).to_csv(options.out, index=False)
        print(rows[-1], flush=True)

    for rate in options.rates:
        edits[rate] = made(rate, 0)
        trials.append(judge(model, validation, edits[rate], rate))
        print(trials[-1], flush=True)
        kept(rate, 0, edits[rate], "validation", validation)
    best = Search("lora", tuple(trials), 0).best.rate
    for seed in range(options.seeds):
        kept(best, seed, made(best, seed) if seed else edits[best], "the rest", test)


if __name__ == "__main__":
    main()
