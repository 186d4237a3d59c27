"""Resistance against retention: MANSU's defaults with one setting changed, on the validation half of `pocket`'s questions.

`python -m tests.benchmarks.frontier --out figures/tables/frontier.csv`: five minutes a setting on one core. What the
attacker in the loop costs and gives, and which of the neighbours of the defaults are beaten in both. Attacks are drawn with
another seed than those of `mansu-tl compare`, and nothing here looks at its questions. A run that was interrupted goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from tqdm.auto import tqdm

import mansu_tl as mtl
from mansu_tl.data.split import split_questions
from mansu_tl.results.files import write_text
from mansu_tl.verification import Relearning, RelearningCurve, attack_splits, compare_relearning

SETTINGS: tuple[tuple[str, Any], ...] = (
    ("default", ""),
    ("adversary_weight", 2.0),
    ("adversary_steps", 8),
    ("retain_weight", 60.0),
    ("fisher", False),
    ("adversary_rate", 1e-3),
    ("adversary_weight", 12.0),
    ("adversary_facts", 4),
    ("adversary_every", 15),
    ("null_space", 0.0),
    ("budget", 0.04),
    ("adversary_weight", 0.0),
    ("retain_weight", 20.0),
    ("budget", 0.0099),
)
_KEPT = ("retain", "retain_paraphrase", "near", "near_paraphrase")
_RATES = {"3e-4": 3e-4, "1e-3": 1e-3}
_STEPS, _ATTACK_SEED = 50, 1


def main(
    out: Annotated[Path, typer.Option()] = Path("figures/tables/frontier.csv"),
    seed: Annotated[int, typer.Option(help="Of the edits.")] = 0,
) -> None:
    """Measure every setting that is not in the table yet."""
    model, never, task = mtl.load("pocket"), mtl.load("pocket-never"), mtl.load_task("pocket")
    validation, _ = split_questions(task)
    attacks = attack_splits(validation, seed=_ATTACK_SEED)
    circuit = mtl.discover_circuit(model, task.forget_pairs)
    read = {"dtype": {"value": str}, "keep_default_na": False}
    rows = pd.read_csv(out, **read).to_dict("records") if out.is_file() else []
    known = {(row["hyperparameter"], row["value"]) for row in rows}
    left = [(key, value) for key, value in SETTINGS if (key, str(value)) not in known]
    reference = _curves("never trained", never, attacks) if left else ()
    for key, value in tqdm(left, unit="setting"):
        changed = {} if key == "default" else {key: value}
        edit = mtl.unlearn(model, validation, "mansu", circuit=circuit, seed=seed, **changed)
        edited = edit.apply(model)
        found = {name: mtl.accuracy(edited, asked) for name, asked in validation.questions.items()}
        kept = {name: 100 - found[name].cloze_percent for name in _KEPT}
        attacked = Relearning((*reference, *_curves("edited", edited, attacks)), "never trained").summary()
        excess = attacked[attacked["label"] == "edited"].set_index("learning_rate")
        cad = mtl.circuit_divergence(model, mtl.quantize(edited, "nf4"), circuit, task.forget_pairs)
        rows.append(
            {
                "hyperparameter": key,
                "value": str(value),
                "forget MC, %": found["forget"].mc_percent,
                "held-out forget MC, %": found["forget_paraphrase"].mc_percent,
                "kept sets, cloze points lost": sum(kept.values()) / len(kept),
                "held-out retain cloze drop, points": kept["retain_paraphrase"],
                "near log-odds, nats": found["near"].log_odds.mean().item(),
                **{
                    f"relearning excess at lr {text}, points{end}": excess.loc[rate, f"over_reference{end}"]
                    for text, rate in _RATES.items()
                    for end in ("", "_low", "_high")
                },
                "CAD after NF4": cad.value,
                "edited, %": 100 * edit.linear_share(model),
            }
        )
        write_text(out, pd.DataFrame(rows).to_csv(index=False))


def _curves(label: str, model: Any, attacks: Any) -> tuple[RelearningCurve, ...]:
    return compare_relearning(
        {label: model}, attacks, learning_rates=tuple(_RATES.values()), steps=_STEPS, ask_at=(0, _STEPS), progress=False
    ).curves


if __name__ == "__main__":
    typer.run(main)
