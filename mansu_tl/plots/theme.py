"""The look of every figure: one template, light or dark, in colours that the colour-blind can tell apart."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mansu_tl.errors import MansuError

FONT = "Inter, 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_SUBTITLE_WIDTH = 130
# Okabe & Ito 2008, ordered so that neighbours also differ in lightness.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


@dataclass(frozen=True)
class Theme:
    """Colours of one theme.

    `band` is one step away from the background, for stripes and cells without a value; `muted` for subtitles and
    reference lines. `positive` supports the answer, `negative` opposes it, the soft ones likewise for the inputs of
    attention and the deep ones for those of the logits; `diverging` runs from negative over zero to positive. `passed` and
    `failed` fill rows of tables.
    """

    name: str
    paper: str
    band: str
    ink: str
    muted: str
    grid: str
    positive: str
    positive_soft: str
    positive_deep: str
    negative: str
    negative_soft: str
    negative_deep: str
    neutral: str
    diverging: tuple[str, str, str]
    passed: str
    failed: str

    @property
    def supporting(self) -> tuple[str, str, str]:
        """Soft, full and deep, of what supports the answer."""
        return self.positive_soft, self.positive, self.positive_deep

    @property
    def opposing(self) -> tuple[str, str, str]:
        """Soft, full and deep, of what opposes it."""
        return self.negative_soft, self.negative, self.negative_deep

    @property
    def template(self) -> go.layout.Template:
        """The plotly template: fonts, margins, axes, legend."""
        lines = {"gridcolor": self.grid, "linecolor": self.muted, "zerolinecolor": self.grid, "tickcolor": self.muted}
        axis = {**lines, "ticks": "outside", "ticklen": 4, "showline": True, "automargin": True}
        axis["title"] = {"standoff": 8, "font": {"size": 13}}
        title = {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"}
        return go.layout.Template(
            layout={
                "font": {"family": FONT, "size": 12, "color": self.ink},
                "paper_bgcolor": self.paper,
                "plot_bgcolor": self.paper,
                "colorway": list(OKABE_ITO[:7]),
                "title": {**title, "pad": {"t": 28, "l": 16}, "font": {"size": 17}},
                "margin": {"l": 64, "r": 24, "t": 84, "b": 56},
                "xaxis": axis,
                "yaxis": axis,
                "legend": {"bgcolor": "rgba(0,0,0,0)", "font": {"size": 12}, "itemsizing": "trace"},
                "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left"},
                "hovermode": "closest",
            }
        )


_THEMES = {
    "light": Theme(
        name="light", paper="#FFFFFF", band="#F3F4F6", ink="#1B1F24", muted="#5B6470", grid="#E3E6EA",
        positive="#0072B2", positive_soft="#56B4E9", positive_deep="#003B63", negative="#D55E00", negative_soft="#E69F00",
        negative_deep="#7A2E00", neutral="#9AA2AC", diverging=("#B34700", "#FFFFFF", "#005C99"),
        passed="#E6F2F9", failed="#FCE9DA",
    ),
    "dark": Theme(
        name="dark", paper="#14181D", band="#1E242B", ink="#E8EBEF", muted="#A2ABB6", grid="#2C343D",
        positive="#56B4E9", positive_soft="#2F86C1", positive_deep="#BFE3F8", negative="#F0883E", negative_soft="#B0742A",
        negative_deep="#FBD0AE", neutral="#707A85", diverging=("#F59B4C", "#20262D", "#62BDF0"),
        passed="#16324A", failed="#4A2A14",
    ),
}  # fmt: skip


def theme_named(name: str) -> Theme:
    """The theme of that name.

    Raises:
        MansuError: there is none.
    """
    if name not in _THEMES:
        raise MansuError(f"theme {name!r}: unknown; choose one of {', '.join(_THEMES)}")
    return _THEMES[name]


def new_figure(look: Theme, title: str, subtitle: str = "", height: float | int = 480, **grid: Any) -> go.Figure:
    """An empty figure in a theme.

    Args:
        title: plain text; it is escaped.
        subtitle: one line on how to read it, plain text; it is wrapped.
        height: in pixels; the width follows the page.
        grid: of panels, as for plotly's `make_subplots`; one panel where not given.
    """
    figure = make_subplots(**grid) if grid else go.Figure()
    figure.update_annotations(font={"size": 13})  # the panels' titles
    lines = textwrap.wrap(subtitle, _SUBTITLE_WIDTH)
    if len(lines) > 1:  # of about equal length
        even = textwrap.wrap(subtitle, len(subtitle) // len(lines) + 12)
        lines = even if len(even) == len(lines) else lines
    below = "".join(f'<br><span style="font-size:12px;color:{look.muted}">{plain(line)}</span>' for line in lines)
    text = {"text": f"<b>{plain(title)}</b>{below}"}
    figure.update_layout(template=look.template, title=text, height=int(height), margin={"t": 60 + 23 * len(lines)})
    return figure


def plain(text: object) -> str:
    """Text that plotly shows as it is: no tag, entity or formula is read into it, and line breaks become visible."""
    return str(text).translate(_ESCAPES)


def fixed(value: float | int, digits: int) -> str:
    """A number with `digits` decimals, a true minus sign and no negative zero; "–" for NaN."""
    if value != value:
        return "–"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def number(value: float | int, digits: int = 3) -> str:
    """A number for reading: `digits` significant ones, a true minus sign, "–" for NaN."""
    if value != value:
        return "–"
    return f"{value:.{digits}g}".replace("-", "−")


def signed(points: float | int, digits: int = 1) -> str:
    """As `fixed`, with a plus sign where it is above zero."""
    text = fixed(points, digits)
    return f"+{text}" if points > 0 and float(text) else text


def translucent(colour: str, opacity: float | int) -> str:
    """A hex colour with an opacity."""
    return f"rgba({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:7], 16)}, {opacity})"
