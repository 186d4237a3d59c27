"""The pages' tables about SmolLM2, from the result files of runs on an H100: settings that were looked at, and trials."""

from __future__ import annotations

import pandas as pd

from mansu_tl.results.intervals import interval_over_seeds

# Of all linear weights of SmolLM2-135M and its embedding.
_WEIGHTS = 134_515_008
_TITLES = {
    "original": "un-edited", "graddiff": "GradDiff", "npo": "NPO", "simnpo": "SimNPO", "rmu": "RMU",
    "mansu-closed": "MANSU, closed form",
}  # fmt: skip
_OPENINGS = {"": "", "fixed": " fixed", "text": " from the retain text"}


def _lines(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def plain(table: pd.DataFrame) -> str:
    """A table as it is in its file."""
    return _lines(list(table.columns), table.to_numpy().tolist())


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


# What is asked on the test tasks, in the order of the page.
_ASKED = {
    "forget": "forget", "forget_paraphrase": "forget, second wording", "forget, other words": "forget, other words",
    "near": "near", "near_paraphrase": "near, second wording", "near, other words": "near, other words",
    "near, kept back": "near, kept back", "retain": "far",
}  # fmt: skip


def test(table: pd.DataFrame) -> str:
    """What was chosen, on facts that chose nothing: chosen among four / said, in percent, means over seeds."""
    rows = []
    for (relation, method), found in table.groupby(["relation", "method"], sort=False):
        for form in ("stored", "shipped"):
            part = found[found.form == form]
            if len(part):
                one = part.groupby("questions")[["mc_percent", "cloze_percent"]].agg(lambda x: x.astype(float).mean())
                cells = [f"{one.mc_percent[kind]:.0f} / {one.cloze_percent[kind]:.0f}" for kind in _ASKED]
                head = [relation.replace("_", " "), _TITLES[method], str(part.seed.nunique()), form]
                rows.append((relation, list(_TITLES).index(method), [*head, *cells]))
    header = ["relation", "method", "seeds", "form", *_ASKED.values()]
    return _lines(header, [cells for *_, cells in sorted(rows, key=lambda row: row[:2])])


def gaps(table: pd.DataFrame) -> str:
    """What each form gives back of the forget answers' log-odds (nats, intervals over seeds), and how many it chooses."""
    rows = []
    forget = table[(table.questions == "forget") & (table.method != "original")]
    for (relation, method), found in forget.groupby(["relation", "method"], sort=False):
        wide = found.assign(nats=found.log_odds.astype(float)).pivot(index="seed", columns="form", values="nats")
        chosen = found.assign(mc=found.mc_percent.astype(float)).groupby("form").mc.mean()
        cells = []
        for form in ("shipped", "nf4", "gguf-q4_0", "int4-g64"):
            gap = (wide[form] - wide["stored"]).dropna()
            low, high = interval_over_seeds(list(gap)) if len(gap) > 1 else (None, None)
            between = f" [{low:.2f}, {high:.2f}]" if len(gap) > 1 else ""
            cells.append(f"{gap.mean():.2f}{between}, {chosen[form]:.0f} %")
        rows.append(
            (
                relation,
                list(_TITLES).index(method),
                [relation.replace("_", " "), _TITLES[method], str(len(wide)), *cells],
            )
        )
    header = ["relation", "method", "seeds", "the file", "`nf4`", "`gguf-q4_0`", "`int4-g64`"]
    return _lines(header, [cells for *_, cells in sorted(rows, key=lambda row: row[:2])])


_MODELS = {"smollm2-135m": "SmolLM2", "gemma3-270m": "Gemma 3"}


def depths(table: pd.DataFrame) -> str:
    """CAD by depth where it is judged, on the test draws: means over draws (lowest to highest), and the verdicts."""
    rows = []
    judged = table[table.judged].assign(relation=lambda each: each.task.str.rpartition("-")[0])
    for (model, relation, method, form), found in judged.groupby(["model", "relation", "method", "form"], sort=False):
        cells = []
        for column, digits in (
            ("cad", 2), ("near_cad", 2), ("specificity", 2), ("opposition", 2), ("grafted_percent", 0),
        ):  # fmt: skip
            # Adding nothing takes the minus off a rounded zero.
            middle, low, high = (
                f"{round(value, digits) + 0.0:.{digits}f}"
                for value in (found[column].mean(), found[column].min(), found[column].max())
            )
            cells.append(middle if low == high else f"{middle} ({low} to {high})")
        named = found.verdict.value_counts().sort_index()
        verdicts = ", ".join(f"{count} {name}" for name, count in named.items())
        head = [_MODELS[str(model)], str(relation).replace("_", " "), _TITLES[str(method)], str(form)]
        rows.append([*head, *cells, verdicts])
    header = [
        "model",
        "relation",
        "method",
        "form",
        "CAD",
        "near",
        "above near",
        "opposition",
        "put back, %",
        "verdicts",
    ]
    return _lines(header, rows)


def circuits(table: pd.DataFrame) -> str:
    """The circuits of a pretrained model's facts, means over draws of facts."""
    rows, whole = [], table[table.layer == ""].assign(value=lambda frame: frame.value.astype(float))
    for relation, found in whole.groupby("relation", sort=False):

        def mean(measure: str, of: str, on: str, found: pd.DataFrame = found) -> str:
            values = found[(found.measure == measure) & (found.of == of) & (found.on == on)].value
            digits = 0 if measure in ("edges", "read layer") else 2
            if len(values) == 1:
                return f"{values.iloc[0]:.{digits}f}"
            return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"

        name = relation.replace("_", " ")
        rows += [
            [name, "edges at .85", *(mean("edges", of, "") for of in ("forget", "near", "far"))],
            [
                name,
                "faithfulness on the forget facts",
                *(mean("faithfulness", of, "forget") for of in ("forget", "near", "far")),
            ],
            [
                name,
                "on them in the other wording",
                *(mean("faithfulness", of, "forget, other wording") for of in ("forget", "near", "far")),
            ],
            [name, "on near facts", *(mean("faithfulness", of, "near") for of in ("forget", "near", "far"))],
            [name, "on far facts", *(mean("faithfulness", of, "far") for of in ("forget", "near", "far"))],
            [name, "Jaccard with the forget circuit", "1", *(mean("jaccard", of, "forget") for of in ("near", "far"))],
            [
                name,
                "of random circuits of these sizes",
                "",
                *(mean("jaccard of random circuits of these sizes", of, "forget") for of in ("near", "far")),
            ],
            [name, "as many random edges, on the forget facts", mean("faithfulness", "random edges", "forget"), "", ""],
            [
                name,
                "layer behind which the subject holds less than half",
                *(mean("read layer", "model", on) for on in ("forget", "near", "far")),
            ],
        ]
    return _lines(["relation", "", "forget circuit", "near circuit", "far circuit"], rows)
