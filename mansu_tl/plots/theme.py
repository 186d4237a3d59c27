"""The look of every figure: one template, light or dark, in colours that the colour-blind can tell apart."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import plotly.graph_objects as go

from mansu_tl.errors import MansuError

_FONT = "Inter, 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_SUBTITLE_WIDTH = 130
# Okabe & Ito 2008, ordered so that neighbours also differ in lightness.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


@dataclass(frozen=True)
class Theme:
    """Colours of one theme.

    Attributes:
        name: "light" or "dark".
        paper: background.
        band: a background one step away from it, for stripes and cells without a value.
        ink: text and node outlines.
        muted: subtitles and reference lines.
        grid: grid lines.
        positive: what supports the answer.
        positive_soft: the same, for the inputs of attention.
        negative: what opposes the answer.
        negative_soft: the same, for the inputs of attention.
        neutral: what is neither, such as references and ghosts.
        diverging: negative, zero, positive.
        passed: fill of a row that passes.
        failed: fill of a row that does not.
    """

    name: str
    paper: str
    band: str
    ink: str
    muted: str
    grid: str
    positive: str
    positive_soft: str
    negative: str
    negative_soft: str
    neutral: str
    diverging: tuple[str, str, str]
    passed: str
    failed: str

    @property
    def template(self) -> go.layout.Template:
        """The plotly template: fonts, margins, axes, legend."""
        axis = {
            "gridcolor": self.grid,
            "linecolor": self.muted,
            "zerolinecolor": self.grid,
            "ticks": "outside",
            "tickcolor": self.muted,
            "ticklen": 4,
            "showline": True,
            "automargin": True,
            "title": {"standoff": 8, "font": {"size": 13}},
        }
        return go.layout.Template(
            layout={
                "font": {"family": _FONT, "size": 12, "color": self.ink},
                "paper_bgcolor": self.paper,
                "plot_bgcolor": self.paper,
                "colorway": list(OKABE_ITO[:7]),
                "title": {
                    "x": 0,
                    "xref": "container",
                    "xanchor": "left",
                    "y": 1,
                    "yref": "container",
                    "yanchor": "top",
                    "pad": {"t": 28, "l": 16},
                    "font": {"size": 17},
                },
                "margin": {"l": 64, "r": 24, "t": 84, "b": 56},
                "xaxis": axis,
                "yaxis": axis,
                "legend": {"bgcolor": "rgba(0,0,0,0)", "font": {"size": 12}, "itemsizing": "trace"},
                "hoverlabel": {"font": {"family": _FONT, "size": 12}, "align": "left"},
                "hovermode": "closest",
            }
        )


_THEMES = {
    "light": Theme(
        name="light",
        paper="#FFFFFF",
        band="#F3F4F6",
        ink="#1B1F24",
        muted="#5B6470",
        grid="#E3E6EA",
        positive="#0072B2",
        positive_soft="#56B4E9",
        negative="#D55E00",
        negative_soft="#E69F00",
        neutral="#9AA2AC",
        diverging=("#B34700", "#FFFFFF", "#005C99"),
        passed="#E6F2F9",
        failed="#FCE9DA",
    ),
    "dark": Theme(
        name="dark",
        paper="#14181D",
        band="#1E242B",
        ink="#E8EBEF",
        muted="#A2ABB6",
        grid="#2C343D",
        positive="#56B4E9",
        positive_soft="#2F86C1",
        negative="#F0883E",
        negative_soft="#E6B44C",
        neutral="#707A85",
        diverging=("#F59B4C", "#20262D", "#62BDF0"),
        passed="#16324A",
        failed="#4A2A14",
    ),
}


def theme_named(name: str) -> Theme:
    """The theme of that name.

    Raises:
        MansuError: there is none.
    """
    if name not in _THEMES:
        raise MansuError(f"theme {name!r}: unknown; choose one of {', '.join(_THEMES)}")
    return _THEMES[name]


def new_figure(theme: Theme, title: str, subtitle: str = "", height: int = 480) -> go.Figure:
    """An empty figure in a theme.

    Args:
        title: plain text; it is escaped.
        subtitle: one line on how to read it, plain text; it is wrapped.
        height: in pixels; the width follows the page.
    """
    return styled(go.Figure(), theme, title, subtitle, height)


def styled(figure: go.Figure, theme: Theme, title: str, subtitle: str = "", height: int = 480) -> go.Figure:
    """The same figure with template, title, subtitle and height set; see `new_figure`."""
    lines = textwrap.wrap(subtitle, _SUBTITLE_WIDTH)
    if len(lines) > 1:  # of about equal length
        even = textwrap.wrap(subtitle, len(subtitle) // len(lines) + 12)
        lines = even if len(even) == len(lines) else lines
    below = "".join(f'<br><span style="font-size:12px;color:{theme.muted}">{plain(line)}</span>' for line in lines)
    figure.update_layout(
        template=theme.template,
        title={"text": f"<b>{plain(title)}</b>{below}"},
        height=height,
        margin={"t": 60 + 23 * len(lines)},
    )
    return figure


def plain(text: object) -> str:
    """Text that plotly shows as it is: no tag, entity or formula is read into it, and line breaks become visible."""
    out = str(text)
    for raw, shown in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("$", "&#36;"),
        ("\n", "\\n"),
        ("\r", "\\r"),
        ("\t", "\\t"),
    ):
        out = out.replace(raw, shown)
    return out


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
