"""What each kind of sweep patches, where a run has to be taken up for it, and with which hook."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, attention_weights
from mansu_tl.runs.passes import Hook, heads_last
from mansu_tl.runs.resume import Base, resume

STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEADS = ("z", "q", "k", "v", "pattern")
TITLES = {
    "resid_pre": "residual stream",
    "resid_mid": "residual stream between attention and MLP",
    "resid_post": "residual stream after the block",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "z": "head output",
    "q": "head query",
    "k": "KV head key",
    "v": "KV head value",
    "pattern": "head attention pattern",
}

# TransformerLens's name of an activation, alone or with its block.
_HOOK = re.compile(r"(?:blocks\.(?P<block>\d+)\.)?(?:attn\.)?hook_(?P<kind>\w+)")


@dataclass(frozen=True)
class Cells:
    """The cells of one sweep: names, shapes, and how one batch of them is run.

    Attributes:
        by: "position", "layer" (all positions of a stream at once), "head" (all positions of a head) or
            "head-position".
    """

    model: TransformerBridge
    anatomy: Anatomy
    component: str
    by: str
    width: int

    @property
    def n_heads(self) -> int:
        """Heads of a layer that the component has."""
        return self.anatomy.n_kv_heads if self.component in ("k", "v") else self.anatomy.n_heads

    @property
    def head_letter(self) -> str:
        """How heads are called in names."""
        return "KV" if self.component in ("k", "v") else "H"

    @property
    def rows(self) -> tuple[str, ...]:
        """Row names: layers, or heads of layers."""
        layers = range(self.anatomy.n_layers)
        if self.by == "head-position":
            return tuple(f"L{i}{self.head_letter}{h}" for i in layers for h in range(self.n_heads))
        return tuple(str(i) for i in layers)

    def columns(self, words: list[str]) -> tuple[str, ...]:
        """Column names: positions with their tokens, heads, or "all"."""
        if self.by == "head":
            return tuple(f"{self.head_letter}{h}" for h in range(self.n_heads))
        if self.by == "layer":
            return ("all positions",)
        return tuple(f"{i} {words[i]}".strip() for i in range(self.width))

    def of_layer(self, layer: int, first: int) -> list[tuple[int, int, int | None, int | None]]:
        """The cells of a layer that can differ from the base: (row, column, head, position).

        Positions before `first` are the same in both runs, so patching them changes nothing.
        """
        places = range(first, self.width)
        if self.by == "position":
            return [(layer, p, None, p) for p in places]
        if self.by == "layer":
            return [(layer, 0, None, None)]
        if self.by == "head":
            return [(layer, h, h, None) for h in range(self.n_heads)]
        return [(layer * self.n_heads + h, p, h, p) for p in places for h in range(self.n_heads)]

    @property
    def roles(self) -> tuple[str, ...]:
        """What a sweep needs of both runs, beside their streams (see `Anatomy.hook`)."""
        attention = ("attn_raw", "attn_out", "mlp_in")
        special: dict[str, tuple[str, ...]] = {"attn_out": attention, "resid_mid": attention, "z": ("z", "attn_raw")}
        return special.get(self.component, () if self.component.startswith("resid") else (self.component,))

    def run(self, base: Base, source: Callable[[str, int], Tensor], layer: int, start: int, cells: list) -> Tensor:
        """Logits [cell, pair, vocab] with the source's values in the cells (all of one layer).

        Args:
            source: the other run's value of (role, layer).
            start: the first position that is run; no cell lies before it.
        """
        count, anatomy, kind = len(cells), self.anatomy, self.component
        places = [slice(None) if p is None else slice(p - start, p - start + 1) for *_, p in cells]
        if kind in HEADS:
            heads = [h for _, _, h, _ in cells]
            if kind == "z":
                return self._heads_out(base, source, layer, start, heads, places)
            wanted = self._by_head(source(kind, layer))[:, start:]

            def replace(value: Tensor, hook: object) -> Tensor:
                out = value.clone()
                per_cell = self._by_head(out).unflatten(0, (count, -1))
                for i, (head, place) in enumerate(zip(heads, places, strict=True)):
                    per_cell[i][:, place, head] = wanted[:, place, head]
                return out

            return resume(self.model, base, layer, start, count, [(anatomy.hook(kind, layer), replace)])
        into = layer if kind == "resid_pre" else layer + 1
        streams = {"resid_pre": ("stream", layer), "resid_mid": ("mlp_in", layer), "resid_post": ("stream", into)}
        role, at = streams.get(kind, (kind, layer))
        change = (source(role, at) - base.value(role, at))[:, start:]

        def add(value: Tensor, hook: object) -> Tensor:
            out = value.clone()
            per_cell = out.unflatten(0, (count, -1))
            for i, place in enumerate(places):
                per_cell[i][:, place] += change[:, place]
            return out

        if kind in ("resid_pre", "resid_post", "mlp_out") or anatomy.parallel:
            return resume(self.model, base, into, start, count, [(anatomy.hook("stream", into), add)])
        # The layer's attention is known: it is handed out patched instead of being computed again.
        attention = base.value("attn_raw", layer)[:, start:].repeat(count, 1, 1)
        if not anatomy.post_norms:
            return resume(self.model, base, layer, start, count, [], attention=add(attention, None))
        hooks: list[Hook] = [(anatomy.hook("attn_out", layer), add)]
        return resume(self.model, base, layer, start, count, hooks, attention=attention)

    def _heads_out(
        self, base: Base, source: Callable[[str, int], Tensor], layer: int, start: int, heads: list, places: list
    ) -> Tensor:
        """Heads' outputs, patched in what their layer's attention hands out."""
        raw, count = base.value("attn_raw", layer)[:, start:], len(heads)
        change = (self._by_head(source("z", layer)) - self._by_head(base.value("z", layer)))[:, start:]
        o = attention_weights(self.model, layer).o
        deltas = torch.zeros(count, *raw.shape, dtype=raw.dtype, device=raw.device)
        for i, (head, place) in enumerate(zip(heads, places, strict=True)):
            deltas[i, :, place] = change[:, place, head] @ o[head].T
        return resume(self.model, base, layer, start, count, [], attention=(raw + deltas).flatten(0, 1))

    def _by_head(self, value: Tensor) -> Tensor:
        """A view as [row, position, head, ...]; of a pattern, the position that attends."""
        return value.transpose(1, 2) if self.component == "pattern" else heads_last(value, self.n_heads)


def component_named(name: str) -> str:
    """A component by its own name or by TransformerLens's, such as "hook_resid_pre" or "attn.hook_z".

    Raises:
        MansuError: the hook of one block; a sweep covers every layer.
    """
    found = _HOOK.fullmatch(name)
    if found is None or found["kind"] not in TITLES:
        return name
    if found["block"] is not None:
        raise MansuError(
            f"patching: component {name!r} is the hook of one block, a sweep covers every layer; pass "
            f"component={found['kind']!r} and read row {found['block']!r} of to_dataframe()"
        )
    return found["kind"]


def require(component: str, by: str | None, parallel: bool) -> str:
    """The way to sweep a component, checked."""
    if component not in TITLES:
        raise MansuError(f"patching: unknown component {component!r}; choose one of {', '.join(TITLES)}")
    if component == "resid_mid" and parallel:
        raise MansuError("patching: resid_mid does not exist in parallel blocks; use resid_pre or attn_out")
    ways = ("position", "layer") if component in STREAMS else ("head", "head-position")
    if by is None:
        return ways[0]
    if by not in ways:
        raise MansuError(f"patching: {component} cannot be swept by {by!r}; choose {' or '.join(ways)}")
    return by
