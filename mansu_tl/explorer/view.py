"""The explorer in a notebook: its page in an iframe, which asks the kernel where anywidget is installed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from mansu_tl.errors import MansuError
from mansu_tl.explorer.explorer import Explorer
from mansu_tl.explorer.page_file import alone, chosen, render
from mansu_tl.explorer.requests import answered

_FRAME = Path(__file__).with_name("page") / "frame.js"
_HEIGHT = 920
# What stands in the widget's place where JupyterLab, often in an environment of its own, cannot draw it.
_NO_WIDGETS = (
    "The explorer is a widget, and this notebook draws none. Install jupyterlab_widgets and anywidget in the "
    "environment that JupyterLab runs in and reload it, or write a page: explore(...).save_html(path)."
)


class ExplorerView:
    """The explorer's page as the last line of a cell shows it.

    With anywidget (`pip install 'mansu-tl[explore]'`) the page asks the kernel: every pair and size, prompts that are typed,
    parts that are switched off. Without, it shows what a saved page shows.

    Attributes:
        explorer: what is chosen, the figures of it, and what the models say; it follows the page, and the page `select`.
        height: of the page, in pixels.
    """

    def __init__(self, explorer: Explorer, height: int = _HEIGHT) -> None:
        self.explorer, self.height = explorer, height
        self._widgets: list[Any] = []

    def select(self, **choices: Any) -> None:
        """Choose as `Explorer.select`, and show it.

        Raises:
            MansuError: as `Explorer.select`; then nothing changes.
        """
        self.explorer.select(**choices)
        for widget in self._widgets:
            widget.send({"choose": chosen(self.explorer.selection)})

    def save_html(
        self,
        path: str | PathLike[str],
        *,
        pairs: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> Path:
        """Write the explorer as a page; see `Explorer.save_html`."""
        return self.explorer.save_html(path, pairs=pairs, sizes=sizes, progress=progress)

    def answer(self, message: Any) -> dict[str, Any] | None:
        """What the page around the iframe is sent back for a message of its."""
        if not isinstance(message, dict):
            return None
        if message.get("page"):
            e = self.explorer
            return {"page": render(e.results, e.selection, e.depth, {"kind": "frame"})}
        if "chosen" in message:
            try:
                self.explorer.select(**message["chosen"])
            except (MansuError, TypeError):
                return None  # of a page that was opened before something changed
            return None
        return {"number": message.get("number"), "answer": answered(self.explorer.results, message.get("request"))}

    def __repr__(self) -> str:
        return f"ExplorerView({self.explorer!r})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        if find_spec("anywidget") is None:
            return {"text/plain": repr(self), "text/html": self._static()}
        widget = self._widget()
        self._widgets.append(widget)
        bundle = widget._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/plain": _NO_WIDGETS}, metadata

    def _static(self) -> str:
        """The page that a file would hold, in an iframe."""
        e = self.explorer
        page = alone(e.results, e.selection, e.depth)
        return (
            f'<iframe sandbox="allow-scripts allow-downloads" srcdoc="{escape(page)}" title="Explorer" '
            f'style="width:100%;height:{self.height}px;border:0"></iframe>'
        )

    def _widget(self) -> Any:
        import anywidget
        import traitlets

        class Frame(anywidget.AnyWidget):
            _esm = _FRAME
            height = traitlets.Int(self.height).tag(sync=True)

        frame = Frame()

        def received(widget: Any, message: Any, buffers: Any) -> None:
            reply = self.answer(message)
            if reply is not None:
                widget.send(reply)

        frame.on_msg(received)
        return frame
