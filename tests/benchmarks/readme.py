"""What `pocket` answers before and after an edit and a quantization: README's table.

    python -m tests.benchmarks.readme

One edit each of GradDiff and MANSU with the settings of `mansu-tl demo`, seed 0, one thread, three minutes on a free core.
The prompts follow from a rule, not from the answers: every 36th forget question, the first questions of the near and the
retain set. Writes figures/tables/readme.csv.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

import mansu_tl as mtl
from mansu_tl.runs import last_logits
from mansu_tl.unlearning import MansuSettings

OUT = Path(__file__).resolve().parents[2] / "figures" / "tables" / "readme.csv"
SHOWN = {"forget": range(0, 192, 36), "near": range(0, 16, 8), "retain": range(1)}
SHARE = "right answers, %"
# The columns of README's table, and how they are called there.
COLUMNS = {
    "original": "original", "GradDiff": "GradDiff", "GradDiff, NF4": "GradDiff, then 4 bits", "MANSU": "MANSU",
    "MANSU, NF4": "MANSU, then 4 bits",
}  # fmt: skip
SETS = {"forget": "to forget", "near": "to keep, alike", "retain": "to keep, other"}


def measure() -> pd.DataFrame:
    """The most likely next word of every model behind every prompt, and the share of right ones over each whole set."""
    model, task = mtl.load("pocket"), mtl.load_task("pocket")
    circuit = mtl.discover_circuit(model, task.forget_pairs, faithfulness=0.85)
    models = {"original": model, "original, NF4": mtl.quantize(model, "nf4")}
    for title, method, settings in (("GradDiff", "graddiff", {}), ("MANSU", "mansu", asdict(MansuSettings.light()))):
        edit = mtl.unlearn(model, task, method, circuit=circuit, seed=0, **settings)
        models[title] = edit.apply(model)
        models[f"{title}, NF4"] = mtl.quantize(models[title], "nf4")
    decode = model.tokenizer.decode
    rows = []
    for name, indices in SHOWN.items():
        asked = task.questions[name][list(indices)]
        answers = {title: last_logits(m, asked.prompts, asked.lengths).argmax(1) for title, m in models.items()}
        for i in range(len(asked)):
            prompt = decode(asked.prompts[i][: asked.lengths[i]], skip_special_tokens=True).strip()
            words = {title: decode(tokens[i : i + 1]) for title, tokens in answers.items()}
            rows.append({"set": name, "prompt": prompt, "right": decode(asked.choices[i, :1]), **words})
        shares = {title: f"{mtl.accuracy(m, task.questions[name]).cloze_percent:.1f}" for title, m in models.items()}
        rows.append({"set": name, "prompt": SHARE, "right": len(task.questions[name]), **shares})
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """README's table; a right answer is bold."""
    lines = [f"| | prompt | {' | '.join(COLUMNS.values())} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for row in table.to_dict("records"):
        shares = row["prompt"] == SHARE
        prompt = f"right, of all {row['right']}" if shares else f"{row['prompt']} ..."
        cells = [
            f"{row[column]} %" if shares else f"**{row[column]}**" if row[column] == row["right"] else row[column]
            for column in COLUMNS
        ]
        lines.append(f"| {' | '.join([SETS[row['set']], prompt, *cells])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = measure()
    measured.to_csv(OUT, index=False)
    print(markdown(measured))
