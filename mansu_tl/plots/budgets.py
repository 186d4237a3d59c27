"""Relearning as budget curves: the strongest attack within each budget, against what a never-trained model learns."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from mansu_tl.plots.panels import legend_below, new_panels, series_styles
from mansu_tl.plots.theme import number, plain, theme_named
from mansu_tl.verification.budgets import RelearningBudgets

_WORDS = {"multiple_choice": "multiple choice, %", "cloze": "cloze, %", "log_odds": "log-odds, nats"}


def relearning_budgets(
    result: RelearningBudgets,
    *,
    measure: str = "multiple_choice",
    excess: bool = True,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw the strongest attack within each budget of steps, one panel for what was trained on and how.

    Bands are 95 % intervals over facts; the never-trained model is dotted and grey, the attacker choosing his rate for it
    too. What lies above it has come back.

    Args:
        measure: "multiple_choice", "cloze" or "log_odds".
        excess: subtract each model's own prior on names that it has never seen.

    Raises:
        MansuError: no such measure.
    """
    look, table = theme_named(theme), result.strongest(measure)
    column = "excess" if excess else "value"
    kinds = list(dict.fromkeys(zip(table["rank"], table["text"], table["facts"], strict=True)))
    kinds.sort(key=lambda kind: kind[0])
    names = [
        f"{f'{facts} forget facts' if facts else text}, {f'LoRA {rank}' if rank else 'all parameters'}"
        for rank, text, facts in kinds
    ]
    ranks = len(dict.fromkeys(kind[0] for kind in kinds))
    how_to_read = (
        "Forget questions that are not in the attack; the learning rate and the step, up to each budget, are those that "
        "bring back most. Bands: 95 % intervals over facts."
        + (f" Above the dotted line ({result.reference}) = knowledge that came back." if result.reference else "")
    )
    panels = new_panels(
        look, title or "What an attacker's budget brings back", how_to_read, names, max(1, len(kinds) // ranks),
        (180, 250), 70, horizontal_spacing=0.04, shared_yaxes=True,
    )  # fmt: skip
    styles = series_styles(result.labels, look, [result.reference])
    steps = list(result.steps)
    where = dict(zip(steps, np.log2(1 + np.array(steps)).tolist(), strict=True))
    for panel, (rank, text, facts) in zip(panels, kinds, strict=True):
        here = table[(table["rank"] == rank) & (table["text"] == text) & (table["facts"] == facts)]
        for label, part in here.groupby("label", sort=False):
            style, name = styles[str(label)], plain(label)
            x = [where[step] for step in part["step"]]
            low, high = part[f"{column}_low"].tolist(), part[f"{column}_high"].tolist()
            panel.band(x, low, high, style.colour, name)
            data = part[["step", f"{column}_low", f"{column}_high", "learning_rate", "at_step"]].to_numpy().tolist()
            panel.series(
                x, part[column].tolist(), name, style, group=name,
                data=[[int(row[0]), row[1], row[2], number(row[3]), int(row[4])] for row in data],
                hover=f"{name}, up to %{{customdata[0]}} steps: %{{y:.1f}} [%{{customdata[1]:.1f}}, %{{customdata[2]:.1f}}]"
                "<br>learning rate %{customdata[3]}, step %{customdata[4]}",
            )  # fmt: skip
        panel.x(tickvals=list(where.values()), ticktext=[str(step) for step in steps], showgrid=False, zeroline=False)
        if panel.col == 1:
            above = _WORDS[measure].replace(", %", ", points")
            panel.y(title_text=f"{above} above prior" if excess else _WORDS[measure])
    panels[0].figure.update_xaxes(title_text="fine-tuning steps (log scale)", row=panels[-1].row)
    legend_below(panels[0].figure, 96, 16)
    return panels[0].figure
