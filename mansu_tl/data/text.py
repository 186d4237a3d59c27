"""From text to tokens: BOS, padding, and where a span of text lies among the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from mansu_tl.data.masks import real_tokens
from mansu_tl.errors import MansuError

if TYPE_CHECKING:
    TextSource = PreTrainedTokenizerBase | TransformerBridge
else:
    TextSource = object


def text_source(source: TextSource, prepend_bos: bool | None = None) -> tuple[PreTrainedTokenizerBase, bool]:
    """The tokenizer to use, and whether a BOS token goes in front.

    Args:
        source: a tokenizer, or a hooked model with one.
        prepend_bos: None = what the family does (a hooked model's `cfg.default_prepend_bos`: no for gpt_neox and
            qwen3), for a bare tokenizer yes if it has a BOS token.

    Raises:
        MansuError: neither a tokenizer nor a model that has one.
    """
    if isinstance(source, TransformerBridge):
        if source.tokenizer is None:
            raise MansuError("text: this model has no tokenizer; load it with tokenizer=, or pass one")
        wanted = bool(source.cfg.default_prepend_bos) if prepend_bos is None else prepend_bos
        return source.tokenizer, wanted
    if not isinstance(source, PreTrainedTokenizerBase):
        raise MansuError(f"text: got a {type(source).__name__}; pass a tokenizer or a model loaded with one")
    return source, True if prepend_bos is None else prepend_bos


def encode(source: TextSource, text: str, prepend_bos: bool | None = None) -> list[int]:
    """Token ids of `text`, with one BOS token in front if the tokenizer has one and it is wanted (see `text_source`)."""
    tokenizer, wanted = text_source(source, prepend_bos)
    return with_bos(tokenizer, list(tokenizer.encode(text, add_special_tokens=False)), wanted)


def with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int], wanted: bool) -> list[int]:
    """The ids with one BOS token in front if the tokenizer has one and it is wanted."""
    bos = tokenizer.bos_token_id
    return [int(bos), *ids] if wanted and bos is not None and ids[:1] != [int(bos)] else ids


def in_chat(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], what: str) -> list[str]:
    """Each text as what a user says, in the tokenizer's chat template, up to where the reply begins.

    The template writes its own special tokens.

    Args:
        what: what an error calls whoever asks.

    Raises:
        MansuError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise MansuError(
            f"{what}: the tokenizer has no chat template; go on without chat, or set tokenizer.chat_template"
        )
    talks = [[{"role": "user", "content": text}] for text in texts]
    return list(tokenizer.apply_chat_template(talks, tokenize=False, add_generation_prompt=True))


def require_text(value: object, what: str) -> None:
    """Refuse anything but text that says something.

    Raises:
        MansuError: no text, blank text, or text that no file can hold (half of a surrogate pair).
    """
    if not isinstance(value, str):
        raise MansuError(f"{what} is {value!r}, not text; write it as text, in quotes")
    if not value.strip():
        raise MansuError(f"{what} is blank ({value!r}); write what it says")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise MansuError(f"{what} {value!r} holds half a character (a lone surrogate); write the whole one") from None


def span_of(tokenizer: PreTrainedTokenizerBase, text: str, part: str, what: str) -> tuple[int, int]:
    """First and one past the last token of `text` (no BOS counted) that share characters with `part`.

    Raises:
        MansuError: `part` is not in the text or is there more than once, or the tokenizer knows no character offsets.
    """
    if not part or text.count(part) != 1:
        raise MansuError(
            f"{what} {part!r} occurs {text.count(part) if part else 0} times in {text!r}; it must occur once"
        )
    if not tokenizer.is_fast:
        raise MansuError(f"{what}: {type(tokenizer).__name__} knows no character offsets; use a fast tokenizer")
    first, last = text.index(part), text.index(part) + len(part)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (a, b) in enumerate(offsets) if a < last and b > first]
    return inside[0], inside[-1] + 1


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills right padding: the pad token, else EOS, else 0 (never attended to under causal attention)."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[Int[Tensor, "row pos"], Int[Tensor, " row"]]:
    """Right-pad token lists to one width; returns the tokens and the real lengths."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long)
    return tokens, torch.tensor([len(row) for row in rows], dtype=torch.long)


def side_by_side(tokenizer: PreTrainedTokenizerBase, a: list[int], b: list[int]) -> str:
    """Two token lists for an error message, with where they part."""
    first, second = tokenizer.convert_ids_to_tokens(a), tokenizer.convert_ids_to_tokens(b)
    parted = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"{first} against {second} (they part at position {parted})"


def unpadded(
    tokens: Int[Tensor, "pair pos"], mask: Tensor, what: str
) -> tuple[Int[Tensor, "pair pos"], Int[Tensor, " pair"]]:
    """Left- or right-padded tokens as right-padded ones, cut to the longest row, and the real lengths.

    Raises:
        MansuError: no tensor, a mask of another shape, one with holes, or a row without a real token.
    """
    if not isinstance(mask, Tensor):
        raise MansuError(f"{what} mask: got a {type(mask).__name__}; pass a tensor of ones and zeros")
    if mask.shape != tokens.shape:
        raise MansuError(f"{what} mask: shape {tuple(mask.shape)}, the tokens have {tuple(tokens.shape)}")
    real = mask.bool()
    lengths = real.sum(1)
    for i, row in enumerate(real):
        where = row.nonzero()[:, 0]
        if len(where) == 0:
            raise MansuError(f"pair {i}: the {what} mask has no real token; drop the pair")
        if int(where[-1] - where[0]) + 1 != len(where):
            raise MansuError(f"pair {i}: the {what} mask has holes; padding must lie at one end")
    first = real.int().argmax(1)
    width = int(lengths.max())
    index = (first[:, None] + torch.arange(width, device=tokens.device)).clamp(max=tokens.shape[1] - 1)
    out = tokens.gather(1, index)
    fill = torch.where(real_tokens(out, lengths), out, out[:, :1])
    return fill, lengths
