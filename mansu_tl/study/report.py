"""The report of a study: its pictures, each with a heading and plain sentences, its summary and every number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from mansu_tl import plots
from mansu_tl.plots.export import Drawing
from mansu_tl.study.further import Further
from mansu_tl.study.kept import Kept, kept_of, ruled_of_saved
from mansu_tl.study.page import Section, write_report
from mansu_tl.study.pictures import Picture, study_pictures
from mansu_tl.study.study import Study
from mansu_tl.unlearning import method_title

_TABLE_TEXT = (
    "Every row of every scorecard. An empty quantizer means full precision; the control is the un-edited model under the "
    "same quantizer."
)
_ANSWERS_TEXT = (
    "The likeliest next word behind the first prompts about facts to be forgotten, and about near facts, which are to be "
    "kept: as edited, and quantized."
)
_RELEARNING_TEXT = (
    "Fine-tuning on twelve of the facts, one draw: how much of the others comes back, beside a model that never knew them. "
    "The light settings of the demo do not defend against it."
)
# Knowledge came back where quantization adds so many points of multiple choice.
_BACK = 10.0
_ORDER = (
    "ptq_gap", "circuit", "patching", "edge_matrix", "divergence", "circuit_stages", "edges_before_after", "bins_mansu",
    "ruler", "bins_baseline",
)  # fmt: skip


def write_study_report(study: Study, *, png: bool = False, further: Further | None = None) -> Path:
    """Write `report.html` into the study's folder, and with `png` every figure into its `figures/`.

    Args:
        png: see above; needs Chromium.
        further: what the models say, and relearning, where they were measured.

    Raises:
        MansuError: `png` is asked for and there is no browser to draw with.
    """
    shown = _shown(study)
    figures = {picture.name: picture.draw("light") for picture in shown}
    if png:
        plots.write_images({study.folder / "figures" / f"{name}.png": figure for name, figure in figures.items()})
    sections = [
        Section("What was found", _verdict(study, further), table=study.summary().round(2)),
        *_further(study, further),
        *(Section(picture.heading, picture.text, figures[picture.name]) for picture in shown),
        Section("Every number", _TABLE_TEXT, table=_all_rows(study), folded=True),
    ]
    title = f"Unlearning {study.config.task} in {study.name}"
    path = study.folder / "report.html"
    return write_report(path, title=title, sections=sections, environment=study.environment, summary="")


def study_figures(study: Study) -> dict[str, Drawing]:
    """Every figure of a study's report by name, in its order."""
    return {picture.name: picture.draw("light") for picture in _shown(study)}


def _shown(study: Study) -> list[Picture]:
    listed = study_pictures(Kept({**kept_of(study), **ruled_of_saved(study)}))
    order = {name: i for i, name in enumerate(_ORDER)}
    shown = sorted((each for each in listed if each.heading), key=lambda each: order.get(each.name, len(order)))
    # The report has one picture of scorecards, that of all methods.
    return [replace(each, name="scorecard") if each.name == "scorecards" else each for each in shown]


def _further(study: Study, further: Further | None) -> Iterator[Section]:
    """What the models say, and what fine-tuning on some of the facts brings back."""
    if further is None:
        return
    if further.answers is not None:
        yield Section("What the models say", _ANSWERS_TEXT, table=further.answers.to_dataframe())
    if further.relearning is not None:
        figure = plots.relearning(further.relearning, chance=study.chance)
        yield Section("What comes back when some of the facts are learnt again", _RELEARNING_TEXT, figure)


def _verdict(study: Study, further: Further | None) -> str:
    random = study.random_faithfulness
    return " ".join(
        (
            *_by_model(study),
            _attack(further),
            f"The circuit has {study.circuit.n_edges} of {int(study.scores.exists.sum())} edges and faithfulness "
            f"{study.circuit.faithfulness:.2f}; {len(random)} random circuits of that size reach at most {max(random):.2f}.",
            f"EAP-IG's completeness residual is {100 * study.scores.relative_residual:.1f} % of the metric's change.",
        )
    )


def _attack(further: Further | None) -> str:
    """What fine-tuning brought back, or that it was not tried."""
    if further is None or further.relearning is None:
        return "No attack was run: whether the facts come back when some of them are learnt again is not known."
    table = further.relearning.summary()
    table = table.loc[table["kind"] == "facts"]
    rate = table["learning_rate"].max()
    hardest = table.loc[table["learning_rate"] == rate]
    found = ", ".join(f"{row.label} {row.value:.0f} %" for row in hardest.itertuples())
    steps = int(hardest["step"].iloc[0])
    return (
        f"No attack is among the rows. Beside them, after {steps} steps on some of the facts at a learning rate of {rate:g}, "
        f"of the other facts are chosen: {found} (one draw of facts)."
    )


def _by_model(study: Study) -> Iterator[str]:
    for name, one in study.every.items():
        back = [
            f"{method_title(m)} ({r.card.value('forget MC, %'):.0f} to {r.card.value('forget MC, %', q):.0f} %)"
            for m, r in one.results.items()
            for q in one.config.quantizers
            if r.card.value("forget MC, points", q) >= _BACK
        ]
        passed = [method_title(method) for method, result in one.results.items() if result.card.passed]
        yield (
            f"On {name}, quantization brings knowledge back for {', '.join(back) or 'no method'}; "
            f"{', '.join(passed) or 'no method'} passes every row that its scorecard has."
        )


def _all_rows(study: Study) -> pd.DataFrame:
    cards = [result.card for one in study.every.values() for result in one.results.values()]
    frames = [card.to_dataframe().round(3) for card in cards]
    for frame, card in zip(frames, cards, strict=True):
        frame.insert(0, "scorecard", card.title)
    return pd.concat(frames, ignore_index=True)
