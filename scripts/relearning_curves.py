"""Relearning as budget curves on a study's edits: `python scripts/relearning_curves.py OUT --run runs/demo`.

RUN is the folder of `make demo`. OUT keeps every curve as it is made, so an interrupted run goes on; at the end it has
budgets.csv (every attack), strongest.csv (the attacker's best choice within each budget), budgets.safetensors and
relearning_budgets.html. The whole plan is 48 curves a model of 400 steps each, hours a model on a busy core;
--facts, --rates, --steps, --ranks and --models cut it down.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

import mansu_tl as mtl
from mansu_tl.unlearning import Edit
from mansu_tl.verification.budgets import TEXTS, BudgetPlan, relearning_budgets

NEVER = "never trained"
MODELS = ("original", "graddiff", "npo", "mansu", "mansu-nf4", "never")


# What the documentation's table keeps of the attacker's best choices, all of multiple choice.
KEPT = ("label", "text", "facts", "rank", "step", "learning_rate", "at_step", "value", "excess")


def kept(strongest: pd.DataFrame) -> pd.DataFrame:
    """The rows behind the documentation's table."""
    found = strongest[(strongest.measure == "multiple_choice") & (strongest.step > 0)]
    ends = [name for name in found.columns if name.startswith("over_reference")]
    return found[[*KEPT, *ends]].assign(learning_rate=found.learning_rate.map("{:g}".format))


def page(strongest: pd.DataFrame) -> str:
    """The table of the documentation: the best rate's points over the never-trained model's best, by text, facts and kind."""
    found = strongest[(strongest.label != NEVER) & (strongest.step == strongest.step.max())]
    kinds = found[["text", "facts", "rank"]].drop_duplicates().sort_values(["rank", "text", "facts"])
    kinds = list(kinds.itertuples(index=False))
    titles = [
        f"{f'{facts} facts' if facts else text}, {f'LoRA {rank}' if rank else 'every weight'}"
        for text, facts, rank in kinds
    ]
    lines = ["| " + " | ".join(["", *titles]) + " |", "| --- " * (len(kinds) + 1) + "|"]
    for label, rows in found.groupby("label", sort=False):
        by = rows.set_index(["text", "facts", "rank"])
        values = [
            [round(by.loc[tuple(kind), f"over_reference{end}"]) for end in ("", "_low", "_high")] for kind in kinds
        ]
        lines.append("| " + " | ".join([str(label), *(f"{x} [{low}, {high}]" for x, low, high in values)]) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(MODELS),
        help="METHOD as it is, METHOD-nf4 as it is shipped, original, never",
    )
    parser.add_argument("--facts", nargs="*", type=int, default=[4, 12, 24, 36])
    parser.add_argument("--texts", nargs="*", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 25, 50, 100, 200, 400])
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 8])
    parser.add_argument("--splits", type=int, default=1)
    parser.add_argument("--out", type=Path, dest="table", help="the documentation's table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.monotonic()
    original, task = mtl.load("pocket"), mtl.load_task("pocket")
    models = {}
    for name in options.models:
        method, _, form = name.partition("-nf4")
        if method == "original":
            model = original
        elif method == "never":
            model = mtl.load("pocket-never")
        else:
            model = Edit.load(options.run / "edits" / method / "edit.safetensors").apply(original)
        label = NEVER if method == "never" else method
        shipped = name.endswith("-nf4") and not form
        models[f"{label}, nf4" if shipped else label] = mtl.quantize(model, "nf4") if shipped else model
    plan = BudgetPlan(
        tuple(options.facts), tuple(options.texts), tuple(options.rates), tuple(options.steps), tuple(options.ranks),
        options.splits,
    )  # fmt: skip
    reference = NEVER if NEVER in models else None
    found = relearning_budgets(models, task, plan, reference=reference, folder=options.out / "curves", progress=True)
    found.save(options.out / "budgets.safetensors")
    found.to_dataframe().to_csv(options.out / "budgets.csv", index=False, float_format="%.4f")
    strongest = found.strongest()
    strongest.to_csv(options.out / "strongest.csv", index=False, float_format="%.4f")
    if options.table:
        kept(strongest).to_csv(options.table, index=False, float_format="%.2f")
    figure = mtl.plots.relearning_budgets(found)
    mtl.plots.write_html(figure, options.out / "relearning_budgets.html", "Relearning budgets")
    last = strongest[strongest.step == found.steps[-1]]
    print(f"{time.monotonic() - start:.0f} s\n{last.round(1).to_string(index=False)}", flush=True)


if __name__ == "__main__":
    main()
