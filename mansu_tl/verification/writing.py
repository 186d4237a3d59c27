"""What a model writes: the likelihood of given answers, and its own greedy ones, by a plain copy with a cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mansu_tl.data.answers import continuation
from mansu_tl.data.text import TextSource, encode, pad, pad_id, text_source, with_bos
from mansu_tl.errors import MansuError
from mansu_tl.models.cache import cache_argument, cache_of
from mansu_tl.models.copies import duplicate
from mansu_tl.models.four_bit import compute_from_codes
from mansu_tl.models.limits import most_positions


def writing_copy(model: TransformerBridge | PreTrainedModel, name: str = "model") -> PreTrainedModel:
    """A plain copy to write with; 4-bit layers compute with what their codes stand for."""
    hf = duplicate(model)
    compute_from_codes(hf, name)
    return hf


@torch.no_grad()
def answer_likelihoods(
    model: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]], fill: int, batch_size: int = 64
) -> tuple[Float[Tensor, " row"], list[Int[Tensor, " token"]]]:
    """Mean log-likelihood per answer token in nats, and the greedy prediction of every answer token.

    Args:
        rows: token ids of prompt and answer.
        fill: id that pads on the right.
    """
    means = torch.empty(len(rows))
    predicted: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        tokens, _ = pad([[*rows[i][0], *rows[i][1]] for i in chosen], fill)
        tokens = tokens.to(model.device)
        # Only the logits from the first answer on are needed; questions are a third of the text.
        first = min(len(rows[i][0]) for i in chosen) - 1
        logits = model(tokens, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits.float()
        best = logits.argmax(-1).cpu()
        chances = logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, first + 1 :, None])[..., 0].cpu()
        for line, i in enumerate(chosen):
            asked = slice(len(rows[i][0]) - 1 - first, len(rows[i][0]) + len(rows[i][1]) - 1 - first)
            means[i], predicted[i] = chances[line, asked].mean(), best[line, asked]
    return means, predicted


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    fill: int,
    end: int | None,
    new_tokens: int,
    batch_size: int = 128,
) -> list[list[int]]:
    """Greedy continuation of every prompt up to the end-of-sequence token, which is left out.

    Args:
        fill: id that pads on the left, masked.
        end: the end-of-sequence token; None = every continuation runs to its cut.
        new_tokens: length at which a continuation is cut.
    """
    out: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        tokens = torch.tensor([[fill] * (width - len(prompts[i])) + prompts[i] for i in chosen], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen], device=model.device
        )
        generated, past = tokens[:, :0], None
        for _ in range(new_tokens):
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            found = model(
                tokens,
                attention_mask=mask,
                position_ids=position,
                use_cache=True,
                logits_to_keep=1,
                **({} if past is None else {cache_argument(model): past}),
            )
            tokens, past = found.logits[:, -1].argmax(-1, keepdim=True), cache_of(found)
            generated = torch.cat([generated, tokens], 1)
            mask = torch.cat([mask, mask.new_ones(len(chosen), 1)], 1)
            if end is not None and bool((generated == end).any(1).all()):
                break
        for i, row in zip(chosen, generated.tolist(), strict=True):
            out[i] = row[: row.index(end)] if end in row else row
    return out


def text_source_of(
    model: TransformerBridge | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, what: str
) -> TextSource:
    """What turns text into a model's tokens: the tokenizer that was given, else the model's own.

    Raises:
        MansuError: neither.
    """
    if tokenizer is not None:
        return tokenizer
    if isinstance(model, TransformerBridge) and model.tokenizer is not None:
        return model
    raise MansuError(f"{what}: this model has no tokenizer; pass tokenizer=")


def mean_log_probs(
    model: TransformerBridge | PreTrainedModel,
    source: TextSource,
    asked: Sequence[tuple[str, str]],
    names: Sequence[str],
    batch_size: int = 64,
    progress: bool = False,
) -> Float[Tensor, " row"]:
    """The mean log-probability per token of each answer behind its prompt, in nats.

    Args:
        asked: prompt and answer.
        names: what errors call each.
        progress: show a bar over the answers.
    """
    return _log_probs(model, source, asked, names, False, batch_size, progress)[0]


def total_log_probs(
    model: TransformerBridge | PreTrainedModel,
    source: TextSource,
    asked: Sequence[tuple[str, str]],
    names: Sequence[str],
    *,
    chat: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> Float[Tensor, " row"]:
    """The log-probability of each answer behind its prompt, summed over its tokens, in nats.

    Args:
        asked: prompt and answer.
        names: what errors call each.
        chat: the prompts bring their template's special tokens, so no BOS token is put in front of them.
        progress: show a bar over the answers.
    """
    means, tokens = _log_probs(model, source, asked, names, chat, batch_size, progress)
    return means * tokens


def _log_probs(
    model: TransformerBridge | PreTrainedModel,
    source: TextSource,
    asked: Sequence[tuple[str, str]],
    names: Sequence[str],
    chat: bool,
    batch_size: int,
    progress: bool,
) -> tuple[Float[Tensor, " row"], Int[Tensor, " row"]]:
    """Mean log-probabilities per token, and how many tokens each answer has."""
    tokenizer, bos = text_source(source)
    rows = []
    for (prompt, answer), name in zip(asked, names, strict=True):
        before, after = continuation(tokenizer, prompt, answer, f"{name}: answer")
        rows.append((with_bos(tokenizer, before, bos and not chat), after))
    lengths = [len(before) + len(after) for before, after in rows]
    _require_room(model, lengths, names, 0)
    hf, found = writing_copy(model), torch.empty(len(rows))
    for chosen in _batches(lengths, batch_size, progress):
        found[chosen] = answer_likelihoods(hf, [rows[i] for i in chosen], pad_id(tokenizer), batch_size)[0]
    return found, torch.tensor([len(after) for _, after in rows])


def written_texts(
    model: TransformerBridge | PreTrainedModel,
    source: TextSource,
    prompts: Sequence[str],
    names: Sequence[str],
    new_tokens: int,
    *,
    chat: bool = False,
    stops: Collection[int] = (),
    batch_size: int = 32,
    progress: bool = False,
) -> list[str]:
    """What a model writes behind each prompt, greedily, up to its end or so many tokens; special tokens are left out.

    Args:
        names: what errors call each prompt.
        stops: further tokens that end an answer.
        chat: the prompts bring their template's special tokens, so no BOS token is put in front of them.
        progress: show a bar over the prompts.
    """
    tokenizer, _ = text_source(source)
    rows = [encode(source, prompt, False if chat else None) for prompt in prompts]
    lengths = [len(row) for row in rows]
    _require_room(model, lengths, names, new_tokens)
    hf, said = writing_copy(model), [[0]] * len(rows)
    for chosen in _batches(lengths, batch_size, progress):
        part = [rows[i] for i in chosen]
        written = greedy_answers(hf, part, pad_id(tokenizer), tokenizer.eos_token_id, new_tokens, batch_size)
        for i, row in zip(chosen, written, strict=True):
            said[i] = row
    said = [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in said]
    return list(tokenizer.batch_decode(said, skip_special_tokens=True))


def _batches(lengths: Sequence[int], batch_size: int, progress: bool) -> Iterator[list[int]]:
    """Which rows are run together, the shortest first."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    with tqdm(total=len(order), desc="answers", unit="answer", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield chosen
            bar.update(len(chosen))


def _require_room(
    model: TransformerBridge | PreTrainedModel, lengths: Sequence[int], names: Sequence[str], new_tokens: int
) -> None:
    """Refuse a text that is longer than the model has positions, with what it is to write."""
    most = most_positions(model)
    for length, name in zip(lengths, names, strict=True):
        if most is not None and length + new_tokens > most:
            behind = f" and {new_tokens} to write" if new_tokens else ""
            raise MansuError(f"{name}: {length} tokens{behind}, the model has {most} positions; drop it")
