"""What each kind of sweep patches, where a run has to be taken up for it, and with which hook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, attention_weights
from mansu_tl.runs.passes import heads_last
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

    def hook_names(self) -> list[str]:
        """The hooks whose values a sweep needs from both runs."""
        out = []
        for i in range(self.anatomy.n_layers):
            block = f"blocks.{i}"
            if self.component in ("attn_out", "resid_mid", "z"):
                out.append(f"{block}.attn.o.hook_in" if self.component == "z" else f"{block}.ln2.hook_in")
                out += [f"{block}.attn.hook_out", self.attention_out(i)]
            if self.component == "mlp_out":
                out.append(self.mlp_out(i))
            if self.component in ("q", "k", "v"):
                out.append(f"{block}.attn.{self.component}.hook_out")
            if self.component == "pattern":
                out.append(f"{block}.attn.hook_pattern")
        return out

    def attention_out(self, layer: int) -> str:
        """Where a layer's attention output has passed everything before it is added to the stream."""
        return f"blocks.{layer}." + ("ln1_post.hook_out" if self.anatomy.post_norms else "attn.hook_out")

    def mlp_out(self, layer: int) -> str:
        """The same for its MLP."""
        return f"blocks.{layer}." + ("ln2_post.hook_out" if self.anatomy.post_norms else "mlp.hook_out")

    def run(self, base: Base, source: Callable[[str, int], Tensor], layer: int, start: int, cells: list) -> Tensor:
        """Logits [cell, pair, vocab] with the source's values in the cells (all of one layer).

        Args:
            source: the other run's value of (what, layer): "stream" (layer L = the final norm's input), "mid",
                "attn_out", "mlp_out", "z", "q", "k", "v", "pattern".
            start: the first position that is run; no cell lies before it.
        """
        count = len(cells)
        places = [slice(None) if p is None else slice(p - start, p - start + 1) for *_, p in cells]
        kind = self.component
        if kind in ("resid_pre", "resid_post", "mlp_out") or (kind == "attn_out" and self.anatomy.parallel):
            into = layer if kind == "resid_pre" else layer + 1
            change = source("stream", into) - base.streams[into]
            if kind in ("mlp_out", "attn_out"):
                name = self.mlp_out(layer) if kind == "mlp_out" else self.attention_out(layer)
                change = source(kind, layer) - base.kept[name]
            hook = f"blocks.{into}.hook_in" if into < self.anatomy.n_layers else "ln_final.hook_in"
            return resume(self.model, base, into, start, count, [(hook, _added(change[:, start:], places, count))])
        if kind in ("attn_out", "resid_mid", "z"):
            return self._after_attention(base, source, layer, start, cells, places)
        name = f"blocks.{layer}.attn." + ("hook_pattern" if kind == "pattern" else f"{kind}.hook_out")
        value = source(kind, layer)
        value = value[:, :, start:] if kind == "pattern" else value[:, start:]
        heads = [h for _, _, h, _ in cells]
        put = _pattern(value, heads, places) if kind == "pattern" else _heads(value, heads, places, self.n_heads)
        return resume(self.model, base, layer, start, count, [(name, put)])

    def _after_attention(
        self, base: Base, source: Callable[[str, int], Tensor], layer: int, start: int, cells: list, places: list
    ) -> Tensor:
        """The layer's attention is known: it is handed out patched instead of being computed again."""
        count, raw = len(cells), base.kept[f"blocks.{layer}.attn.hook_out"][:, start:]
        if self.component == "z":
            name = f"blocks.{layer}.attn.o.hook_in"
            change = heads_last(source("z", layer), self.anatomy.n_heads) - heads_last(
                base.kept[name], self.anatomy.n_heads
            )
            o = attention_weights(self.model, layer).o
            deltas = torch.zeros(count, *raw.shape, dtype=raw.dtype, device=raw.device)
            for i, ((_, _, head, _), place) in enumerate(zip(cells, places, strict=True)):
                deltas[i, :, place] = change[:, start:][:, place, head] @ o[head].T
            patched = (raw + deltas).flatten(0, 1)
            return resume(self.model, base, layer, start, count, [], attention=patched)
        if self.component == "resid_mid":
            change = source("mid", layer) - base.kept[f"blocks.{layer}.ln2.hook_in"]
        else:
            change = source("attn_out", layer) - base.kept[self.attention_out(layer)]
        add = _added(change[:, start:], places, count)
        whole = raw.repeat(count, 1, 1)
        if not self.anatomy.post_norms:
            return resume(self.model, base, layer, start, count, [], attention=add(whole, None))
        return resume(self.model, base, layer, start, count, [(self.attention_out(layer), add)], attention=whole)


def require(component: str, by: str | None, parallel: bool) -> str:
    """The way to sweep a component, checked.

    Raises:
        MansuError: an unknown component or way, or one that the component or family does not have.
    """
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


def _added(change: Tensor, places: list[slice], count: int) -> Callable[..., Tensor]:
    def hook_fn(value: Tensor, hook: object) -> Tensor:
        out = value.clone()
        per_cell = out.unflatten(0, (count, -1))
        for i, place in enumerate(places):
            per_cell[i][:, place] += change[:, place]
        return out

    return hook_fn


def _heads(source: Tensor, heads: list[int], places: list[slice], n_heads: int) -> Callable[..., Tensor]:
    wanted = heads_last(source, n_heads)

    def hook_fn(value: Tensor, hook: object) -> Tensor:
        out = value.clone()
        per_cell = heads_last(out, n_heads).unflatten(0, (len(heads), -1))
        for i, (head, place) in enumerate(zip(heads, places, strict=True)):
            per_cell[i][:, place, head] = wanted[:, place, head]
        return out

    return hook_fn


def _pattern(source: Tensor, heads: list[int], places: list[slice]) -> Callable[..., Tensor]:
    def hook_fn(value: Tensor, hook: object) -> Tensor:
        out = value.clone()
        per_cell = out.unflatten(0, (len(heads), -1))
        for i, (head, place) in enumerate(zip(heads, places, strict=True)):
            per_cell[i][:, head, place] = source[:, head, place]
        return out

    return hook_fn
