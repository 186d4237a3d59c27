"""The live explorer: ipywidgets around `Explorer`; every control calls `Explorer.select` and redraws what depends on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import ipywidgets as w
import plotly.graph_objects as go

from mansu_tl.errors import MansuError
from mansu_tl.explorer.explorer import Explorer
from mansu_tl.explorer.pictures import SELECTED, clicked, ring_places
from mansu_tl.explorer.selection import Item, item_name
from mansu_tl.plots.theme import fixed

_TABS = {
    "scores": "Scores",
    "weights": "Weights",
    "attention": "Attention",
    "faithfulness": "Faithfulness",
    "edges": "All edges",
}
# What each picture depends on; it is drawn again when one of these changes.
_USES = {
    "graph": {"method", "quantizer", "size", "alone"},
    "scores": {"method", "quantizer", "pair", "item"},
    "weights": {"method", "quantizer", "item", "part"},
    "attention": {"method", "quantizer", "pair", "item"},
    "faithfulness": {"size"},
    "edges": {"method", "quantizer", "size", "alone"},
}


class ExplorerWidget(w.VBox):
    """The explorer in a notebook.

    Attributes:
        explorer: what is chosen, and the figures; usable without the widgets.
        controls: the input widgets by the name of what they choose.
        figures: the figure widgets that are drawn now, by name.
    """

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self.controls: dict[str, Any] = _controls(explorer)
        self.figures: dict[str, go.FigureWidget] = {}
        self._status = w.HTML(layout={"min_height": "24px"})
        self._answers = w.HTML()
        self._graph = w.Box(layout={"width": "100%", "overflow": "auto"})
        self._places = {name: w.Box(layout={"width": "100%", "overflow": "auto"}) for name in _TABS}
        self._stale: set[str] = set(_USES)
        self._quiet = False
        weights = w.VBox([self.controls["part"], self._places["weights"]], layout={"width": "100%"})
        self._tabs = w.Tab(
            [weights if name == "weights" else self._places[name] for name in _TABS],
            titles=list(_TABS.values()),
            layout={"width": "100%"},
        )
        self._tabs.observe(lambda change: self._draw(), "selected_index")
        for name, control in self.controls.items():
            control.observe(self._chosen(name), "value")
        rows = [
            w.HBox([self.controls[name] for name in names], layout={"flex_flow": "row wrap", "width": "100%"})
            for names in (("method", "quantizer", "size"), ("pair", "alone", "item"))
        ]
        super().__init__([*rows, self._answers, self._status, self._graph, self._tabs], layout={"width": "100%"})
        self._draw()
        self._show_answers()

    def select(self, **choices: Any) -> None:
        """Choose as `Explorer.select`, and show it.

        Raises:
            MansuError: as `Explorer.select`; then nothing changes.
        """
        before = self.explorer.selection
        new = self.explorer.select(**choices)
        changed = {name for name in type(new).__dataclass_fields__ if getattr(new, name) != getattr(before, name)}
        self._stale |= {name for name, uses in _USES.items() if uses & changed}
        self._show_choices(changed)
        if changed & {"method", "quantizer", "pair"}:
            self._show_answers()
        if "item" in changed and "graph" not in self._stale:
            self._ring()
        self._draw()

    def save_html(
        self, path: str | PathLike[str], *, pairs: Sequence[int] | None = None, sizes: Sequence[int] | None = None
    ) -> Path:
        """Write the explorer as a page; see `Explorer.save_html`."""
        return self.explorer.save_html(path, pairs=pairs, sizes=sizes)

    def _chosen(self, name: str) -> Callable[[Any], None]:
        def changed(change: Any) -> None:
            if not self._quiet and change["new"] is not None:
                self.select(**{name: change["new"]})

        return changed

    def _show_choices(self, changed: set[str]) -> None:
        """Put the controls where the selection is, without their calling back."""
        self._quiet = True
        try:
            if changed & {"size", "item"}:
                items = self.explorer.items()
                if self.explorer.selection.item not in items:
                    items = [self.explorer.selection.item, *items]
                self.controls["item"].options = [(item_name(item), item) for item in items]
            if "item" in changed:
                self.controls["part"].value = None
                self.controls["part"].options = self.explorer.parts()
            for name, control in self.controls.items():
                control.value = self.explorer.part() if name == "part" else getattr(self.explorer.selection, name)
        finally:
            self._quiet = False

    def _show_answers(self) -> None:
        self._working("computing the answers")
        table = self.explorer.answers().to_html(index=False, border=0, float_format=lambda value: fixed(value, 2))
        self._answers.value = _prompts(self.explorer) + table
        self._status.value = ""

    def _draw(self) -> None:
        """Draw what is visible and out of date."""
        visible = list(_TABS)[self._tabs.selected_index or 0]
        for name in ("graph", visible):
            if name not in self._stale:
                continue
            self._working(f"computing: {name}")
            place = self._graph if name == "graph" else self._places[name]
            try:
                figure = go.FigureWidget(self.explorer.figure(name))
            except MansuError as error:
                self.figures.pop(name, None)
                place.children = [w.HTML(f"<p>{escape(str(error))}</p>")]
            else:
                self.figures[name] = figure
                place.children = [figure]
                if name == "graph":
                    self._listen(figure)
            self._stale.discard(name)
        self._status.value = ""

    def _listen(self, figure: go.FigureWidget) -> None:
        def on_click(trace: Any, points: Any, state: Any) -> None:
            for i in points.point_inds:
                item = clicked(list(trace.customdata[i]))
                if item is not None:
                    self.select(item=item)

        for trace in figure.data:
            if trace.customdata is not None:
                trace.on_click(on_click)

    def _ring(self) -> None:
        figure = self.figures.get("graph")
        if figure is None:
            return
        rings = [trace for trace in figure.data if trace.name == SELECTED]
        with figure.batch_update():
            for trace, (x, y) in zip(rings, ring_places(figure, self.explorer.selection.item), strict=True):
                trace.x, trace.y = x, y

    def _working(self, text: str) -> None:
        self._status.value = f"<i>{escape(text)} …</i>"


def _prompts(explorer: Explorer) -> str:
    """The chosen pair's prompts as HTML, tokens that differ in bold, with the answer and its rival."""
    results, pair = explorer.results, explorer.selection.pair
    clean, corrupt = results.tokens(pair), results.tokens(pair, corrupt=True)
    answer, rival = results.asked(pair)
    rows = ""
    for name, tokens, others, end in (("clean", clean, corrupt, answer), ("corrupt", corrupt, clean, rival)):
        words = [(escape(a), a != b) for a, b in zip(tokens, others, strict=True)]
        shown = " ".join(f"<b>{word}</b>" if differs else word for word, differs in words)
        rows += f"<tr><th>{name}</th><td>{shown} → <b>{escape(end)}</b></td></tr>"
    return f"<table>{rows}</table>"


def _controls(explorer: Explorer) -> dict[str, Any]:
    results, now = explorer.results, explorer.selection
    wide = {"width": "430px"}
    items: list[Item] = explorer.items()
    parts = explorer.parts()
    return {
        "method": w.Dropdown(
            options=[(results.titles[m], m) for m in results.edits], value=now.method, description="method"
        ),
        "quantizer": w.Dropdown(options=results.quantizers, value=now.quantizer, description="quantizer"),
        "size": w.SelectionSlider(
            options=results.sizes, value=now.size, description="edges", continuous_update=False, layout=wide
        ),
        "pair": w.Dropdown(
            options=[(f"{i}: {results.label(i)}", i) for i in range(len(results.pairs))],
            value=now.pair,
            description="pair",
            layout=wide,
        ),
        "alone": w.ToggleButtons(
            options=[("all pairs", False), ("this pair", True)],
            value=now.alone,
            tooltips=["edges carry the mean over all pairs", "edges carry the scores of the chosen pair"],
            style={"button_width": "80px"},
        ),
        "item": w.Dropdown(
            options=[(item_name(item), item) for item in items], value=now.item, description="look at", layout=wide
        ),
        "part": w.Dropdown(options=parts, value=explorer.part(), description="weights", layout=wide),
    }
