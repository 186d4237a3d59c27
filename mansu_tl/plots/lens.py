"""The logit lens: what a model would answer if it stopped behind each layer."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from mansu_tl.errors import MansuError
from mansu_tl.plots.panels import PERCENT, distinct, legend_below, new_panel, series_styles
from mansu_tl.plots.theme import number, plain, theme_named
from mansu_tl.verification import LogitLens

_MEASURES = {"multiple_choice": "multiple choice, %", "cloze": "cloze, %", "log_odds": "log-odds, nats"}
_TICKS = 16  # names of layers that fit side by side


def logit_lens(
    results: LogitLens | Sequence[LogitLens],
    *,
    measure: str = "multiple_choice",
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw what each layer's stream answers through the model's own final norm and unembedding, one line a model.

    The last layer is the model's own answer. An edited model whose last layer is silent while an earlier one answers has
    kept the knowledge. Bands are 95 % intervals over facts.

    Args:
        measure: "multiple_choice", "cloze" or "log_odds".

    Raises:
        MansuError: none given, two of one label, different layers, or an unknown measure.
    """
    look = theme_named(theme)
    if measure not in _MEASURES:
        raise MansuError(f"logit lens: unknown measure {measure!r}; choose one of {', '.join(_MEASURES)}")
    several = [results] if isinstance(results, LogitLens) else list(results)
    labels = distinct("logit lens", [each.label for each in several])
    layers = [plain(name) for name in several[0].layers]
    for each in several:
        if each.layers != several[0].layers:
            raise MansuError(
                f"logit lens: {each.label!r} has other layers than {labels[0]!r}; compare models of one shape"
            )
    how_to_read = (
        "The stream behind each layer, read by the model's own final norm and unembedding; the last layer is what the model "
        "answers. Bands: 95 % intervals over facts."
    )
    panel = new_panel(look, title or "What each layer would answer", how_to_read, 480)
    x, looks = list(range(len(layers))), series_styles(labels, look)
    for label, each in zip(labels, several, strict=True):
        style, name, table = looks[label], plain(label), each.to_dataframe()
        low, high = (table[f"{measure}_{end}"].tolist() for end in ("low", "high"))
        panel.band(x, low, high, style.colour, name)
        panel.series(
            x, table[measure].tolist(), name, style, group=name, data=list(zip(layers, low, high, strict=True)),
            hover=f"{name}, behind %{{customdata[0]}}<br>%{{y:.1f}} [%{{customdata[1]:.1f}}, %{{customdata[2]:.1f}}]",
        )  # fmt: skip
    if measure == "multiple_choice":
        chance = 100 * several[0].chance
        panel.level(chance, f"chance {number(chance)} %")
    every = max(1, round(len(x) / _TICKS))
    panel.x(tickvals=x[::every], ticktext=layers[::every], title_text="stream behind", showgrid=False, zeroline=False)
    panel.y(title_text=_MEASURES[measure], **({} if measure == "log_odds" else PERCENT))
    legend_below(panel.figure)
    return panel.figure
