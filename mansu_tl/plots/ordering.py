"""In which column a head stands, so that the edges of a circuit cross each other little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mansu_tl.circuit.graph import layer_of
from mansu_tl.plots.layered import place

_PASSES = 4


def untangled(writers: Sequence[str], edges: Sequence[tuple[str, str]], kv_groups: int) -> dict[str, int]:
    """A column for every head of every layer, found by swapping neighbours as long as that removes crossings.

    Heads that share a KV head stay side by side. Edges count as straight lines; edges with a common end do not cross.

    Returns:
        Column by head; never more crossings than with heads in their own order.
    """
    n_heads = sum(name.startswith("L0H") for name in writers)
    layers = 1 + max(layer_of(name) for name in writers)
    order = {layer: list(range(n_heads)) for layer in range(layers)}
    best = crossings(writers, edges, kv_groups, _columns(order))
    for _ in range(_PASSES):
        start = best
        for layer in order:
            for size in sorted({kv_groups, 1}, reverse=True):
                for i in range(0, n_heads - size, size):
                    # Single heads trade places inside their group only.
                    if size == 1 < kv_groups and (i + 1) % kv_groups == 0:
                        continue
                    here = order[layer]
                    order[layer] = here[:i] + here[i + size : i + 2 * size] + here[i : i + size] + here[i + 2 * size :]
                    now = crossings(writers, edges, kv_groups, _columns(order))
                    if now < best:
                        best = now
                    else:
                        order[layer] = here
        if best == start or not best:
            break
    return _columns(order)


def crossings(
    writers: Sequence[str], edges: Sequence[tuple[str, str]], kv_groups: int, columns: Mapping[str, int] | None = None
) -> int:
    """How many pairs of edges cross, drawn as straight lines; see `untangled`."""
    placement = place(writers, edges, kv_groups, columns)
    ends = np.array([[*placement.nodes[writer], *placement.entry(reader)] for writer, reader in edges])
    a, b = ends[:, None, :2], ends[:, None, 2:]
    c, d = ends[None, :, :2], ends[None, :, 2:]
    apart = (_turn(a, b, c) * _turn(a, b, d) < 0) & (_turn(c, d, a) * _turn(c, d, b) < 0)
    return int(np.triu(apart, 1).sum())


def _columns(order: Mapping[int, list[int]]) -> dict[str, int]:
    return {f"L{layer}H{head}": column for layer, heads in order.items() for column, head in enumerate(heads)}


def _turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Twice the signed area of the triangles; positive = c lies to the left of the way from a to b."""
    return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])
