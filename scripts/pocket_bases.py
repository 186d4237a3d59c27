"""MANSU and baselines on base checkpoints of their own: `python scripts/pocket_bases.py OUT BASE... --out TABLE.csv`.

Every BASE is a folder of `python -m scripts.train_pocket --seed N --out BASE` (`pocket` and `pocket-never` of another
initial state and another order of the texts); `embedded` is the package's own pair. Settings were chosen on the embedded
one, so other bases chose nothing. Each edit is asked as stored and in NF4, read by depth, and relearnt beside the
never-trained model of its own base. `--out` writes every base's numbers, and their mean with an interval over facts and
bases. Edits and what they answer are kept in OUT, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch

import mansu_tl as mtl
from mansu_tl.data.counterparts import counterparts, facts_first
from mansu_tl.errors import NoEditError
from mansu_tl.results.intervals import interval_over_facts, interval_over_seeds
from mansu_tl.unlearning import Edit, settings_of, unlearn
from mansu_tl.verification import DepthReader, attack_splits, compare_relearning, logit_lens
from scripts.fair_baselines import NEVER, ROWS, circuit_of

EMBEDDED, ALL = "embedded", "all"
# The chosen trials of `fair_baselines`, and MANSU's own settings.
METHODS: dict[str, tuple[str, Any]] = {
    "un-edited": ("", None),
    "GradDiff": ("graddiff", {"learning_rate": 1e-3, "retain_weight": 30.0, "near_share": 0.5, "retain_batch": 64}),
    "NPO": ("npo", {"learning_rate": 1e-3, "retain_weight": 100.0, "near_share": 0.5, "retain_batch": 64}),
    "MANSU, early layers": ("mansu-early", {}),
}
ASKED = ("forget", "forget_paraphrase", "near", "near_paraphrase", "retain")
RATES = (3e-4, 1e-3)
Cell = dict[str, Any]


class Base:
    """One pair of checkpoints, and what its edits are read by."""

    def __init__(self, place: str, out: Path) -> None:
        names = [name if place == EMBEDDED else str(Path(place) / name) for name in ("pocket", "pocket-never")]
        self.name = place if place == EMBEDDED else Path(place).name
        self.model, self.never = (mtl.load(name) for name in names)
        self.task = mtl.load_task("pocket")
        self.folder = out / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.circuit = circuit_of(self.model, self.task, self.folder)
        pairs, near = self.task.forget_pairs, counterparts(self.task.questions["near"], ROWS)
        self.reader = DepthReader(self.model, pairs[sorted(facts_first(pairs.facts)[:ROWS])], near)

    def edit(self, method: str, seed: int) -> Edit:
        """One edit, from OUT where it is there."""
        place = self.folder / f"{method}-{seed}.safetensors"
        if not place.exists():
            name, given = METHODS[method]
            circuit = self.circuit if name.startswith("mansu") else None
            unlearn(self.model, self.task, name, settings=settings_of(name, given), seed=seed, circuit=circuit).save(
                place
            )
        return Edit.load(place)

    def cell(self, method: str, seed: int) -> Cell:
        """What one edit comes to; answers by question."""
        if METHODS[method][1] is None:
            return {
                "answers": answers(self.model, self.task),
                "NF4": answers(mtl.quantize(self.model, "nf4"), self.task),
            }
        try:
            edited = self.edit(method, seed).apply(self.model)
        except NoEditError as error:
            return {"none": str(error)}
        found: Cell = {"answers": answers(edited, self.task), "NF4": answers(mtl.quantize(edited, "nf4"), self.task)}
        read = self.reader.read(edited, label=method)
        at = read.layers[read.judged]
        lens = logit_lens(edited, self.task.questions["forget"]).to_dataframe().set_index("layer")
        found["inside"] = {
            f"CAD behind {at}": float(read.cad[read.judged]),
            f"the same less near facts', behind {at}": float(read.specificity[read.judged]),
            "added opposition": float(read.opposition),
            f"logit lens behind {at}, %": float(lens.multiple_choice[at]),
        }
        found["verdict"] = read.verdict().name
        attacks = attack_splits(self.task, k=12, splits=2)
        again = compare_relearning({method: edited, NEVER: self.never}, attacks, reference=NEVER).summary()
        for one in again[again.label == method].itertuples():
            name = f"relearning, 12 facts at {one.learning_rate:g}: over never trained, points"
            found["inside"][name] = float(one.over_reference)
        return found


def answers(model: Any, task: Any) -> Cell:
    """Every question's answer: right of four, said, and the log-odds."""
    out: Cell = {}
    for kind in ASKED:
        found = mtl.accuracy(model, task.questions[kind])
        out[kind] = {
            "fact": list(found.facts),
            "chosen among four, %": (100 * found.multiple_choice.double()).tolist(),
            "said, %": (100 * found.cloze.double()).tolist(),
            "log-odds, nats": [round(x, 4) for x in found.log_odds.tolist()],
        }
    return out


def table_of(cells: dict[tuple[str, str, int], Cell]) -> pd.DataFrame:
    """Every base's measures and their mean: over facts and bases for answers, over bases (Student's t) for the others."""
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(key[0] for key in cells):
        of_method = {key[1:]: cell for key, cell in cells.items() if key[0] == method and "none" not in cell}
        for stage, kind, measure in _asked(of_method):
            values = {
                key: (cell[stage][kind]["fact"], torch.tensor(cell[stage][kind][measure], dtype=torch.float64))
                for key, cell in of_method.items()
            }
            name = f"{kind}, {'as stored' if stage == 'answers' else stage}, {measure}"
            every = torch.cat([found for _, found in values.values()])
            facts = [f"{base} {seed} {fact}" for (base, seed), (own, _) in values.items() for fact in own]
            low, high = interval_over_facts(every, facts)
            rows += [_row(method, *key, name, float(found.mean())) for key, (_, found) in values.items()]
            rows.append(_row(method, ALL, "", name, float(every.mean())) | {"low": low, "high": high})
        inside = {key: cell["inside"] for key, cell in of_method.items() if "inside" in cell}
        for name in next(iter(inside.values()), {}):
            found = [values[name] for values in inside.values()]
            low, high = interval_over_seeds(found)
            rows += [_row(method, *key, name, values[name]) for key, values in inside.items()]
            rows.append(_row(method, ALL, "", name, sum(found) / len(found)) | {"low": low, "high": high})
        rows += [_row(method, *key, "verdict", cell["verdict"]) for key, cell in of_method.items() if "verdict" in cell]
    return pd.DataFrame(rows)


def _asked(cells: dict[tuple[str, int], Cell]) -> list[tuple[str, str, str]]:
    measures = ("chosen among four, %", "said, %", "log-odds, nats")
    return [(stage, kind, each) for stage in ("answers", "NF4") for kind in ASKED for each in measures if cells]


def _row(method: str, base: str, seed: int | str, measure: str, value: float | str) -> dict[str, Any]:
    return {"method": method, "base": base, "seed": seed, "measure": measure, "value": value}


# What the documentation shows: a line's name, the measure behind it, digits.
SHOWN = (
    ("forget, chosen among four, %", "forget, as stored, chosen among four, %", 0),
    ("the same in NF4, %", "forget, NF4, chosen among four, %", 0),
    ("the same in NF4, held-out wording, %", "forget_paraphrase, NF4, chosen among four, %", 0),
    ("near, chosen among four, in NF4, %", "near, NF4, chosen among four, %", 0),
    ("near, said, held-out wording, in NF4, %", "near_paraphrase, NF4, said, %", 0),
    ("near, log-odds, in NF4, nats", "near, NF4, log-odds, nats", 1),
    ("far, chosen among four, in NF4, %", "retain, NF4, chosen among four, %", 0),
    ("CAD behind L1", "CAD behind L1", 2),
    ("the same less near facts'", "the same less near facts', behind L1", 2),
    ("added opposition", "added opposition", 2),
    ("logit lens behind L1, %", "logit lens behind L1, %", 0),
    *(
        (
            f"relearning, 12 facts at {rate:g}, points",
            f"relearning, 12 facts at {rate:g}: over never trained, points",
            0,
        )
        for rate in RATES
    ),
)


def page(table: pd.DataFrame) -> str:
    """The table of the documentation: every base's number, in their order."""
    found = table[table.base != ALL]
    names = list(dict.fromkeys(found.method))
    lines = ["| " + " | ".join(["", *names]) + " |", "| --- " * (len(names) + 1) + "|"]
    for title, measure, digits in SHOWN:
        cells = [title]
        for name in names:
            values = pd.to_numeric(found[(found.method == name) & (found.measure == measure)].value)
            # Adding nothing takes the minus off a rounded zero.
            cells.append(" / ".join(f"{round(float(x), digits) + 0.0:.{digits}f}" for x in values))
        lines.append("| " + " | ".join(cells) + " |")
    verdicts = found[found.measure == "verdict"].groupby("method").value
    cells = [" / ".join(verdicts.get_group(name)) if name in verdicts.groups else "" for name in names]
    lines.append("| verdict by depth | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("bases", nargs="+", help=f"folders of train_pocket, or {EMBEDDED!r}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, cells = time.monotonic(), {}
    for method in options.methods:
        for place in options.bases:
            base = Base(place, options.folder)
            for seed in options.seeds:
                kept = base.folder / f"{method}-{seed}.json"
                if not kept.exists():
                    kept.write_text(json.dumps(base.cell(method, seed)), encoding="utf-8")
                cells[method, base.name, seed] = json.loads(kept.read_text(encoding="utf-8"))
                print(f"{time.monotonic() - start:6.0f} s  {method}, base {base.name}, seed {seed}", flush=True)
                if options.out:
                    table_of(cells).to_csv(options.out, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
