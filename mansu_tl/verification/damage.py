"""A damage audit: what an edit did to the loss on text, the weights, the activations and what the model writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Sequences
from mansu_tl.data.fit import require_fit, require_sequences
from mansu_tl.data.text import encode, pad_id
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import (
    Anatomy,
    attention_weights,
    home,
    linear_weights,
    mlp_weights,
    parameters,
    require_ready,
)
from mansu_tl.models.kinds import require_bridge
from mansu_tl.models.limits import most_positions
from mansu_tl.results.intervals import with_interval
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.streams import require_one_shape, residual_streams, stream_hooks
from mansu_tl.verification.writing import greedy_answers, writing_copy

PARTS = ("loss", "weights", "activations", "generations")


@dataclass(frozen=True)
class Damage(Result):
    """The original against the edited model, in four tables.

    Attributes:
        label: what the edited model is.
        loss: one row a text set: mean next-token loss before and after (nats a token), the rise with its 95 %
            interval over sequences, the largest rise of a single sequence.
        weights: one row a matrix (`L0.q`, ..., and the other parameters by HF name): Frobenius norm before and after,
            norm of the change relative to the norm before, share of the weights that changed.
        activations: one row a text set and layer (the stream entering block 0, then leaving each block): mean norm
            before and after over real tokens, mean norm of the change relative to the norm before, mean cosine.
        generations: one row a prompt: greedy continuations before and after, and whether they agree.
    """

    label: str
    loss: pd.DataFrame
    weights: pd.DataFrame
    activations: pd.DataFrame
    generations: pd.DataFrame

    def to_dataframe(self, what: str = "loss") -> pd.DataFrame:
        """One of the tables: "loss", "weights", "activations" or "generations".

        Raises:
            MansuError: there is no such table.
        """
        if what not in PARTS:
            raise MansuError(f"damage: no table {what!r}; choose one of {', '.join(PARTS)}")
        frame: pd.DataFrame = getattr(self, what)
        return frame

    def __repr__(self) -> str:
        losses = ", ".join(f"{row.text} {row.before:.3f} -> {row.after:.3f}" for row in self.loss.itertuples())
        changed = self.weights["relative_change"]
        worst = self.weights["matrix"].iloc[int(changed.to_numpy().argmax())]
        same = f"{int(self.generations['same'].sum())} of {len(self.generations)} generations the same"
        return f"Damage({self.label}: loss {losses}; largest weight change {changed.max():.3f} in {worst}; {same})"

    def _tables(self) -> Sequence[Table]:
        captions = {"loss": "loss, in nats"}
        return [Table(getattr(self, part), captions.get(part, part), "{:.4f}".format) for part in PARTS]


@torch_defaults()
def damage(
    original: TransformerBridge,
    edited: TransformerBridge,
    texts: Mapping[str, Sequences],
    *,
    prompts: Sequence[str] | Sequences = (),
    max_new_tokens: int = 12,
    batch_size: int = 64,
    label: str = "edited",
) -> Damage:
    """Audit an edited model; 4-bit models are taken as what they compute with.

    Args:
        texts: text sets by name, e.g. {"retain": task.retain_text}; each sequence has at least two tokens.
        prompts: what both models continue, as text (needs the original's tokenizer) or as tokens.
        max_new_tokens: of each continuation; it ends earlier at the tokenizer's EOS.
        batch_size: sequences in a forward pass.
        label: what the edited model is, for tables and figures.

    Raises:
        MansuError: no text, sequences of fewer than two tokens, models of different shape, or prompts without a
            tokenizer to read and write them.
    """
    for model in (original, edited):
        require_bridge(model)
    for text in (*texts.values(), *([prompts] if isinstance(prompts, Sequences) else [])):
        require_sequences(text)
        require_fit(original, text)
    if not texts or any(len(text) == 0 for text in texts.values()):
        raise MansuError(f"damage: text sets {sorted(texts)}, at least one of them has to be there and none empty")
    for name, text in texts.items():
        if int(text.lengths.min()) < 2:
            raise MansuError(f"damage: text set {name!r} has a sequence of one token, which has no loss; drop it")
    require_one_shape("damage", original, edited=edited)
    for model in (original, edited):
        require_ready(model, next(iter(texts.values())).tokens)
    losses, activations = zip(
        *(_losses_and_streams(original, edited, name, text, batch_size) for name, text in texts.items()), strict=True
    )
    return Damage(
        label, pd.DataFrame(losses), _weights(original, edited), pd.concat(activations, ignore_index=True),
        _generations(original, edited, prompts, max_new_tokens),
    )  # fmt: skip


@torch.no_grad()
def _losses_and_streams(
    original: TransformerBridge, edited: TransformerBridge, name: str, text: Sequences, batch_size: int
) -> tuple[dict[str, Any], pd.DataFrame]:
    """A text set's row of the loss table, and its rows of the table of activations."""
    layers, device = list(stream_hooks(original)), home(original)
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    sums = torch.zeros(4, len(layers), dtype=torch.float64)
    for start in range(0, len(text), batch_size):
        batch = text[slice(start, start + batch_size)].to(device)
        real = batch.real
        streams = []
        for model, parts in zip((original, edited), losses, strict=True):
            kept, logits = residual_streams(model, batch, every_logit=True)
            streams.append(torch.stack([stream.to(device) for stream in kept])[:, real].double())
            parts.append(_sequence_losses(logits.to(device).float(), batch).cpu())
        before, after = streams
        norm = before.norm(dim=-1)
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        for i, value in enumerate((norm, after.norm(dim=-1), (after - before).norm(dim=-1) / norm, cosine)):
            sums[i] += value.sum(1).cpu()
    columns = ("norm_before", "norm_after", "relative_change", "cosine")
    means = dict(zip(columns, (sums / int(text.lengths.sum())).tolist(), strict=True))
    before, after = (torch.cat(parts) for parts in losses)
    return _loss_row(name, before, after, text.lengths.cpu() - 1), pd.DataFrame({"text": name, "layer": layers} | means)


def _loss_row(
    name: str, before: Float[Tensor, " row"], after: Float[Tensor, " row"], targets: Int[Tensor, " row"]
) -> dict[str, Any]:
    """From each sequence's summed loss: the mean a token, and the rise of a sequence's own mean."""
    means = [loss.sum().item() / int(targets.sum()) for loss in (before, after)]
    if not all(map(math.isfinite, means)):
        raise MansuError(
            f"damage: the loss on {name!r} is {means[0]} before and {means[1]} after the edit; check the weights and "
            "their dtype"
        )
    rise = (after - before) / targets
    row: dict[str, Any] = {"text": name, "sequences": len(rise), "before": means[0], "after": means[1]}
    row |= with_interval("rise", rise, [str(i) for i in range(len(rise))])
    return row | {"largest_rise": rise.max().item()}


def _sequence_losses(logits: Float[Tensor, "row pos vocab"], batch: Sequences) -> Float[Tensor, " row"]:
    """Each sequence's next-token losses, added up."""
    targets = batch.tokens[:, 1:]
    # Flat: classes on a middle axis have no deterministic form on a GPU.
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    losses = losses.view_as(targets)
    return (losses.double() * batch.real[:, 1:]).sum(1)


def _weights(original: TransformerBridge, edited: TransformerBridge) -> pd.DataFrame:
    rows = []
    for (name, before), (_, after) in zip(_matrices(original), _matrices(edited), strict=True):
        old, new = before.double(), after.to(before.device).double()
        norm, moved = old.norm().item(), (new - old).norm().item()
        relative = moved / norm if norm else float(moved > 0)
        rows.append((name, old.numel(), norm, new.norm().item(), relative, (new != old).double().mean().item()))
    columns = ("matrix", "weights", "norm_before", "norm_after", "relative_change", "changed_share")
    return pd.DataFrame(rows, columns=columns)


def _matrices(model: TransformerBridge) -> list[tuple[str, Tensor]]:
    """Every weight once, linear layers by what they do, the rest by HF name."""
    out = []
    for layer in range(Anatomy.of(model).n_layers):
        attention, mlp = attention_weights(model, layer), mlp_weights(model, layer)
        out += [(f"L{layer}.{part}", getattr(attention, part)) for part in "qkvo"]
        out += [(f"L{layer}.{p}", w) for p in ("gate", "up", "down") if (w := getattr(mlp, p)) is not None]
    linear = linear_weights(model)
    out += [(name, value.detach()) for name, value in parameters(model).items() if name not in linear]
    return out


def _generations(
    original: TransformerBridge, edited: TransformerBridge, prompts: Sequence[str] | Sequences, max_new_tokens: int
) -> pd.DataFrame:
    columns = ["prompt", "before", "after", "same"]
    if len(prompts) == 0:
        return pd.DataFrame(columns=columns)
    tokenizer = original.tokenizer
    if tokenizer is None:
        raise MansuError("damage: the original has no tokenizer to read and write prompts; load it with tokenizer=")
    if max_new_tokens < 1:
        raise MansuError(f"damage: max_new_tokens={max_new_tokens}; write at least one")
    if isinstance(prompts, Sequences):
        asked = [row[:length] for row, length in zip(prompts.tokens.tolist(), prompts.lengths.tolist(), strict=True)]
    else:
        asked = [encode(original, prompt) for prompt in prompts]
    most, longest = most_positions(original), max(map(len, asked))
    if most is not None and longest + max_new_tokens - 1 > most:
        raise MansuError(
            f"damage: max_new_tokens={max_new_tokens} behind a prompt of {longest} tokens, the model has {most} "
            "positions; write fewer or shorten the prompt"
        )
    fill, eos = pad_id(tokenizer), tokenizer.eos_token_id
    written = [greedy_answers(writing_copy(m), asked, fill, eos, max_new_tokens) for m in (original, edited)]
    rows = []
    for i, (before, after) in enumerate(zip(*written, strict=True)):
        shown = tokenizer.decode(asked[i]) if isinstance(prompts, Sequences) else prompts[i]
        rows.append([shown, tokenizer.decode(before), tokenizer.decode(after), before == after])
    return pd.DataFrame(rows, columns=columns)
