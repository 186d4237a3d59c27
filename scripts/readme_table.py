"""Writes figures/tables/readme.csv: what `pocket` answers before and after each edit and each quantization, for README.

One edit each of GradDiff and MANSU with the settings of `mansu-tl demo`, seed 0, one thread; three minutes on a CPU.
The prompts follow from a rule, not from their answers: the first question of every sixth hazard potion (to be forgotten),
the first question of the first two potions of the near set (to be kept). The last rows are the shares of right answers.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

import mansu_tl as mtl
from mansu_tl.runs import last_logits
from mansu_tl.unlearning import MansuSettings

OUT = Path(__file__).resolve().parents[1] / "figures" / "tables" / "readme.csv"
# Questions per fact in the forget and near sets, facts per potion, and how many potions lie between two that are shown.
WORDINGS, FACTS, EVERY = 4, 2, 6


def main() -> None:
    torch.set_num_threads(1)
    model, task = mtl.load("pocket"), mtl.load_task("pocket")
    circuit = mtl.discover_circuit(model, task.forget_pairs, faithfulness=0.85)
    models = {"original": model, "original, NF4": mtl.quantize(model, "nf4")}
    for title, method, settings in (("GradDiff", "graddiff", {}), ("MANSU", "mansu", asdict(MansuSettings.light()))):
        edit = mtl.unlearn(model, task, method, circuit=circuit, seed=0, progress=True, **settings)
        models[title] = edit.apply(model)
        models[f"{title}, NF4"] = mtl.quantize(models[title], "nf4")

    def words(set_name: str, rows: list[int]) -> list[dict[str, str]]:
        asked = task.questions[set_name][rows]
        said = {title: last_logits(m, asked.prompts, asked.lengths).argmax(1) for title, m in models.items()}
        return [
            {
                "set": set_name,
                "prompt": model.tokenizer.decode(asked.prompts[i][: asked.lengths[i]]),
                "right": model.tokenizer.decode(asked.choices[i, :1]),
                **{title: model.tokenizer.decode(answers[i : i + 1]) for title, answers in said.items()},
            }
            for i in range(len(rows))
        ]

    def shares(set_name: str) -> list[dict[str, str]]:
        right = {title: mtl.accuracy(m, task.questions[set_name]) for title, m in models.items()}
        return [
            {"set": set_name, "prompt": "multiple choice, %", **{t: f"{a.mc_percent:.1f}" for t, a in right.items()}},
            {
                "set": set_name,
                "prompt": "most likely word, %",
                **{t: f"{a.cloze_percent:.1f}" for t, a in right.items()},
            },
        ]

    forget = list(range(0, len(task.questions["forget"]), WORDINGS * FACTS * EVERY + WORDINGS))
    rows = [*words("forget", forget), *words("near", [0, WORDINGS * FACTS])]
    pd.DataFrame([*rows, *shares("forget"), *shares("near"), *shares("retain")]).to_csv(OUT, index=False)
    print(OUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
