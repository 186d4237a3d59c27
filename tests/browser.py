"""A real headless browser for tests: the Chromium of the machine, driven by playwright, cut off from the network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mansu_tl.plots.export import browser

_LOCAL = ("file:", "data:", "blob:")


@dataclass
class Tab:
    """An open page and everything it complained about.

    `dialogs` are alerts that ran, `requests` what it tried to fetch from elsewhere, `asked` when it was opened
    (`time.perf_counter`).
    """

    page: Any
    asked: float = field(default_factory=time.perf_counter)
    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    session: Any = None

    def devtools(self, method: str) -> dict[str, Any]:
        """What Chromium itself says of the page, by the DevTools protocol."""
        if self.session is None:
            self.session = self.page.context.new_cdp_session(self.page)
            self.session.send("Performance.enable")
        return self.session.send(method)

    def hover(self, plot: str, trace: int, point: int) -> str:
        """Put the mouse on a point of a plot with x and y axes; what the hover label says."""
        self.page.locator(plot).scroll_into_view_if_needed()
        x, y = self.page.evaluate(_PLACE, [plot, trace, point])
        self.page.mouse.move(x - 3, y - 3)
        self.page.mouse.move(x, y)
        label = self.page.locator(f"{plot} .hoverlayer .hovertext").first
        label.wait_for(timeout=10_000)
        return label.text_content()

    def click(self, plot: str, trace: int, point: int) -> None:
        """Click on a point of a plot."""
        self.page.locator(plot).scroll_into_view_if_needed()
        x, y = self.page.evaluate(_PLACE, [plot, trace, point])
        self.page.mouse.move(x - 3, y - 3)
        self.page.mouse.move(x, y)
        self.page.locator(f"{plot} .hoverlayer .hovertext").first.wait_for(timeout=10_000)
        self.page.mouse.click(x, y)

    def hidden(self, where: str) -> bool:
        """Whether an element is not shown."""
        return not self.page.locator(where).is_visible()


_PLACE = """([plot, trace, point]) => {
  const graph = document.querySelector(plot), box = graph.getBoundingClientRect(), data = graph._fullData[trace];
  const layout = graph._fullLayout;
  const axis = (name) => layout[name[0] + "axis" + name.slice(1)];
  const xs = axis(data.xaxis), ys = axis(data.yaxis);
  return [box.left + xs._offset + xs.d2p(data.x[point]), box.top + ys._offset + ys.d2p(data.y[point])];
}"""


@contextmanager
def opened(path: Path | str, width: int = 1400, height: int = 1000) -> Iterator[Tab]:
    """Open a file without a network, or an address of this machine; skips where there is no Chromium or no playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    program = browser()
    if program is None:
        pytest.skip("no Chromium on this machine: install Debian's chromium, or set BROWSER_PATH")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            context = started.new_context(viewport={"width": width, "height": height}, offline=isinstance(path, Path))
            tab = Tab(context.new_page())
            local = _LOCAL if isinstance(path, Path) else (*_LOCAL, path.partition("?")[0])
            tab.page.on("console", lambda m: tab.errors.append(m.text) if m.type in ("error", "warning") else None)
            tab.page.on("pageerror", lambda error: tab.errors.append(str(error)))
            tab.page.on("request", lambda r: None if r.url.startswith(local) else tab.requests.append(r.url))

            def dismiss(dialog: Any) -> None:
                tab.dialogs.append(dialog.message)
                dialog.dismiss()

            tab.page.on("dialog", dismiss)
            tab.asked = time.perf_counter()
            tab.page.goto(path.resolve().as_uri() if isinstance(path, Path) else path, timeout=120_000)
            yield tab
        finally:
            started.close()
