"""How fast the explorer opens and answers to the mouse, in a headless Chromium, beside the machine's load.

    python -m tests.benchmarks.explorer FOLDER... [--png DIR]

For each results folder and for 1366 x 768 and 1920 x 1080: the time from the address to the drawn graph, and a hundred moves
of the mouse over edges and nodes of all panels, with the edges that are drawn at first, with 300 and with all of the circuit.
A move's time is from the mouse event to the end of the next painted frame. Beside both stands the CPU time of the page's
process as Chromium counts it, which says more than the clock on a machine that does other work too. A report or a saved page
given in place of a folder is opened and timed the same way, up to its last plot. What the console says is in the table, and
`--png` keeps what was on the screen. A minute a folder.
"""

from __future__ import annotations

import math
import os
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from mansu_tl.explorer import ExplorerServer, open_results
from tests.browser import Tab, opened

SIZES = ((1366, 768), (1920, 1080))
MOVES = 100
# What a move takes: from the event to the task behind the frame that shows it.
WATCH = """() => {
  let last = Promise.resolve(0);
  window.shown = () => last;
  window.addEventListener("mousemove", () => {
    const start = performance.now();
    last = new Promise((done) => requestAnimationFrame(() => {
      const channel = new MessageChannel();
      channel.port1.onmessage = () => done(performance.now() - start);
      channel.port2.postMessage(0);
    }));
  }, true);
}"""
# The places of so many nodes and edges, spread over all of them and over the panels.
PLACES = """(count) => {
  const { graph } = window.explorer, { edges, nodes } = graph.items, out = [];
  const panels = window.explorer.state.shown === "all" ? 3 : 1;
  for (let i = 0; i < count; i++) {
    const from = i % 4 ? edges : nodes, name = from[Math.floor((i * from.length) / count)];
    const at = graph.where(name, i % panels);
    if (at) out.push(at);
  }
  return out;
}"""


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, float]]:
    """A folder's address, and how long it took until it was there."""
    start = time.perf_counter()
    with ExplorerServer(open_results(folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.address, time.perf_counter() - start
        finally:
            server.shutdown()
            thread.join()


def metric(tab: Tab, name: str) -> float:
    """One of Chromium's own figures of the page's process."""
    return next(each["value"] for each in tab.devtools("Performance.getMetrics")["metrics"] if each["name"] == name)


def opening(tab: Tab, drawn: str, whole: str) -> dict[str, Any]:
    """Seconds from the address until the graph is drawn and until everything is there."""
    out = {}
    for what, ready in (("drawn", drawn), ("everything", whole)):
        tab.page.wait_for_function(ready, timeout=600_000, polling=10)
        out[f"{what} s"] = round(time.perf_counter() - tab.asked, 2)
        out[f"{what} CPU s"] = round(metric(tab, "ProcessTime"), 2)
    return out


def settle(tab: Tab) -> None:
    """Wait until what was asked for is drawn."""
    tab.page.wait_for_function("window.explorer.busy === 0", timeout=600_000)
    tab.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def draw(tab: Tab, share: float) -> None:
    """Move the slider of the strongest edges: 0 = five, 100 = all."""
    tab.page.evaluate(
        """(value) => {
          const slider = document.querySelector("#most");
          slider.value = value;
          slider.dispatchEvent(new Event("input"));
        }""",
        share,
    )


def hovers(tab: Tab) -> dict[str, Any]:
    """A hundred moves over what is drawn."""
    settle(tab)
    places = tab.page.evaluate(PLACES, MOVES)
    rows, told = [], 0
    for x, y in places:
        before = metric(tab, "ProcessTime")
        tab.page.mouse.move(x, y)
        wall = tab.page.evaluate("window.shown()")
        rows.append({"ms": wall, "CPU ms": 1000 * (metric(tab, "ProcessTime") - before)})
        told += tab.page.locator(".tip").is_visible()
    found = pd.DataFrame(rows)
    return {
        "edges": int(tab.page.locator("body").get_attribute("data-drawn")),
        "moves": len(found),
        "told": told,
        **{f"{what} p{p}": round(found[what].quantile(p / 100), 1) for what in found for p in (50, 95)},
    }


def explorer(address: str | Path, name: str, png: Path | None) -> Iterator[dict[str, Any]]:
    """One row a size of the window and number of edges."""
    for width, height in SIZES:
        with opened(address, width, height) as tab:
            opening_ = opening(
                tab, "document.body.dataset.drawn", "document.body.dataset.ready && !window.explorer.busy"
            )
            keep(tab, png, f"{name}_{width}")
            tab.page.evaluate(WATCH)
            total = tab.page.evaluate("window.explorer.total")
            for many in dict.fromkeys((None, min(300, total), total)):
                if many is not None:
                    draw(tab, 100 * math.log(many / 5) / math.log(total / 5))
                yield {"page": name, "window": f"{width} x {height}", **opening_, **hovers(tab), **said(tab)}
            keep(tab, png, f"{name}_{width}_all")


def file(path: Path, png: Path | None) -> Iterator[dict[str, Any]]:
    """One row a size of the window: a report, which is there when its last plot is."""
    last = "document.querySelectorAll('.main-svg').length && [...document.querySelectorAll('.js-plotly-plot, [id^=figure-]')]"
    for width, height in SIZES:
        with opened(path, width, height) as tab:
            first = "document.querySelector('.main-svg')"
            times = opening(tab, first, f"{last}.every((each) => each.querySelector('.main-svg'))")
            keep(tab, png, f"{path.stem}_{width}")
            yield {"page": path.name, "window": f"{width} x {height}", **times, **said(tab)}


def told(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same rows, said as they come."""
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        yield row


def said(tab: Tab) -> dict[str, Any]:
    """What the page complained of, and how busy the machine was."""
    return {"console": "; ".join(tab.errors), "load": round(os.getloadavg()[0], 1)}


def keep(tab: Tab, folder: Path | None, name: str) -> None:
    """Write what is on the screen."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        tab.page.screenshot(path=folder / f"{name}.png")


def main() -> None:
    """Print the table."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("places", nargs="+", type=Path, help="results folders, reports, saved pages")
    parser.add_argument("--png", type=Path, help="where the screenshots go")
    given = parser.parse_args()
    rows = []
    for place in given.places:
        if place.is_dir():
            with served(place) as (address, seconds):
                print(f"{place}: read in {seconds:.1f} s")
                rows += told(explorer(address, place.name, given.png))
        elif "explorer.graph" in place.read_text(encoding="utf-8"):
            rows += told(explorer(place, place.stem, given.png))
        else:
            rows += told(file(place, given.png))
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
