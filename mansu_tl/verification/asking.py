"""What models say: the same prompts, answered greedily by several models, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data.text import in_chat, pad_id
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.results.result import Result, Table
from mansu_tl.verification.writing import greedy_answers, writing_copy


@dataclass(frozen=True)
class SideBySide(Result):
    """What each model said after each prompt.

    Attributes:
        prompts: the prompts.
        models: what the models are called.
        answers: one row a prompt, one entry a model: the continuation, without the prompt.
    """

    prompts: tuple[str, ...]
    models: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a prompt, one column a model."""
        return pd.DataFrame(self.answers, columns=list(self.models)).assign(prompt=self.prompts)[
            ["prompt", *self.models]
        ]

    def markdown(self) -> str:
        """The table in Markdown."""
        rows = [("prompt", *self.models), *(("---",) * (len(self.models) + 1),)]
        rows += [(prompt, *row) for prompt, row in zip(self.prompts, self.answers, strict=True)]
        cells = ([" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows)
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)

    def __repr__(self) -> str:
        return f"SideBySide({len(self.prompts)} prompts, answered by {', '.join(self.models)})"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), rows=len(self.prompts)),)


@torch_defaults()
def ask(
    models: TransformerBridge | Mapping[str, TransformerBridge],
    prompts: str | Sequence[str],
    *,
    new_tokens: int = 12,
    chat: bool = False,
) -> SideBySide:
    """Ask models the same things and put their greedy answers side by side.

    Args:
        models: one model, or several by the name of their column.
        prompts: texts that the models go on with.
        new_tokens: where an answer is cut; it ends before that where the model ends it.
        chat: put each prompt into the tokenizer's chat template, as what a user says.

    Raises:
        MansuError: no model or prompt, an empty prompt, a model without a tokenizer, or a tokenizer without a chat template.

    Example:
        >>> table = mtl.ask(mtl.load("pocket"), "the catalyst of amber balm is", new_tokens=1)
        >>> table.answers
        (('dreamash',),)
    """
    named = models if isinstance(models, Mapping) else {models.cfg.model_name or "model": models}
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not named or not texts or not all(text.strip() for text in texts):
        raise MansuError(f"ask: {len(named)} models, {len(texts)} prompts; give at least one of each, and none empty")
    columns = [_answers(name, model, texts, new_tokens, chat) for name, model in named.items()]
    return SideBySide(texts, tuple(named), tuple(zip(*columns, strict=True)))


def _answers(name: str, model: TransformerBridge, texts: Sequence[str], new_tokens: int, chat: bool) -> list[str]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise MansuError(f"ask: {name} has no tokenizer; load it with tokenizer=")
    texts = in_chat(tokenizer, texts, f"ask: {name}") if chat else texts
    ids = tokenizer(list(texts), add_special_tokens=not chat)["input_ids"]
    written = greedy_answers(writing_copy(model, name), ids, pad_id(tokenizer), tokenizer.eos_token_id, new_tokens)
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
