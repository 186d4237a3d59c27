"""The pages' tables about SmolLM2, from the result files of runs on an H100: settings that were looked at, and trials."""

from __future__ import annotations

import pandas as pd

# Of all linear weights of SmolLM2-135M and its embedding.
_WEIGHTS = 134_515_008
_TITLES = {
    "original": "un-edited", "graddiff": "GradDiff", "npo": "NPO", "simnpo": "SimNPO", "rmu": "RMU",
    "mansu-closed": "MANSU, closed form",
}  # fmt: skip
_OPENINGS = {"": "", "fixed": " fixed", "text": " from the retain text"}


def _lines(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def settings(table: pd.DataFrame) -> str:
    """What three settings do, as stored in the file's own codes: chosen among four / said, in percent."""
    kinds = [
        "forget",
        "forget_paraphrase",
        "forget, other words",
        "near",
        "near_paraphrase",
        "near, other words",
        "retain",
    ]
    stored, rows = table[table.form == "stored"], []
    for key, found in stored.groupby(["neuron_share", "contexts", "openings", "weights", "seconds"], sort=False):
        share, contexts, openings, weights, seconds = map(str, key)
        score = {one.questions: f"{one.mc_percent} / {one.cloze_percent}" for one in found.itertuples()}
        head = ["un-edited", "", "", ""]
        if share:
            head = [share, f"{contexts}{_OPENINGS[openings]}", f"{100 * float(weights) / _WEIGHTS:.2f} %", seconds]
        rows.append([*head, *(score[kind] for kind in kinds)])
    return _lines(["neurons", "openings", "weights", "seconds", *kinds], rows)


def trials(table: pd.DataFrame) -> str:
    """Every trial on the validation facts, as stored and as shipped: chosen among four / said, in percent."""
    kinds = ["forget", "forget, other words", "near, kept back"]
    keys = ["relation", "method", "learning_rate", "retain_weight", "near_share", "quantizer", "null_space"]
    rows = []
    for key, found in table.groupby(keys, sort=False):
        relation, method, rate, weight, share, grids, null = map(str, key)
        score = {(one.form, one.questions): f"{one.mc_percent} / {one.cloze_percent}" for one in found.itertuples()}
        said = f"rate {rate}, retain weight {weight}, near share {share}" if rate else ""
        if grids:
            said = f"null_space {null}, floor on {'the file' if grids == 'gguf' else 'four grids'}"
        cells = [score.get((form, kind), "") for kind in kinds for form in ("stored", "shipped")]
        rows.append(
            (relation, list(_TITLES).index(method), said, [relation.replace("_", " "), _TITLES[method], said, *cells])
        )
    header = ["relation", "method", "trial", *(f"{kind}, {form}" for kind in kinds for form in ("stored", "shipped"))]
    return _lines(header, [cells for *_, cells in sorted(rows)])
