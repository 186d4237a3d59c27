"""Whether a model writes the answer when it goes on freely, rather than when it is asked to choose or to say it at once.

A question's prompt is continued greedily, and each of its options counts as written where its tokens stand in the
continuation, one behind the other, at any place. The right option is what is measured; how often the wrong ones are
written is what such an answer's words come to by themselves. Our definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Questions
from mansu_tl.data.fit import require_fit, require_questions
from mansu_tl.data.text import pad_id
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import require_ready
from mansu_tl.models.kinds import require_bridge
from mansu_tl.models.limits import most_positions
from mansu_tl.results.intervals import with_interval
from mansu_tl.results.result import Result, Table
from mansu_tl.verification.writing import greedy_answers, writing_copy


@dataclass(frozen=True)
class Written(Result):
    """What stands in a model's continuations.

    Attributes:
        right: whether the right option does.
        wrong: the share of the wrong options that do.
        new_tokens: where a continuation was cut.
        facts: the fact behind each question.
    """

    right: Bool[torch.Tensor, " question"]
    wrong: Float[torch.Tensor, " question"]
    new_tokens: int
    facts: tuple[str, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row: both in percent with 95 % intervals over facts."""
        right = with_interval("right", self.right, self.facts, scale=100.0)
        return pd.DataFrame([{**right, **with_interval("wrong", self.wrong, self.facts, scale=100.0)}])

    def __repr__(self) -> str:
        right, wrong = (100 * each.double().mean().item() for each in (self.right, self.wrong))
        asked = f"{len(self.right)} questions, {self.new_tokens} tokens"
        return f"Written({asked}: right {right:.1f} %, a wrong one {wrong:.1f} %)"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "in percent", "{:.1f}".format),)


@torch_defaults()
def written(model: TransformerBridge, questions: Questions, *, new_tokens: int = 12) -> Written:
    """Let a model go on behind every question, greedily, and look for the options.

    Args:
        new_tokens: where a continuation is cut; it ends before that where the model ends it.

    Raises:
        MansuError: fewer than one token, questions that do not fit the model, or no room behind the longest prompt.

    Example:
        >>> from mansu_tl.verification.generation import written
        >>> model, questions = mtl.load("pocket"), mtl.load_task("pocket").questions["forget"]
        >>> written(model, questions[:4], new_tokens=2).right.all().item()
        True
    """
    require_bridge(model)
    require_questions(questions)
    require_fit(model, questions)
    require_ready(model, questions.prompts)
    if new_tokens < 1:
        raise MansuError(f"generation: new_tokens={new_tokens}; write at least one")
    most, longest = most_positions(model), int(questions.lengths.max())
    if most is not None and longest + new_tokens - 1 > most:
        raise MansuError(
            f"generation: new_tokens={new_tokens} behind a prompt of {longest} tokens, the model has {most} positions; write "
            "fewer or shorten the prompt"
        )
    asked = [row[:length] for row, length in zip(questions.prompts.tolist(), questions.lengths.tolist(), strict=True)]
    tokenizer = model.tokenizer
    fill, end = (0, None) if tokenizer is None else (pad_id(tokenizer), tokenizer.eos_token_id)
    texts = greedy_answers(writing_copy(model), asked, fill, end, new_tokens)
    options = questions.options if questions.options.ndim == 3 else questions.options[..., None]
    found = torch.tensor(
        [
            [_stands(option[: option.index(-1)] if -1 in option else option, text) for option in row]
            for row, text in zip(options.tolist(), texts, strict=True)
        ]
    )
    return Written(found[:, 0], found[:, 1:].float().mean(1), new_tokens, questions.facts)


def _stands(option: Sequence[int], text: Sequence[int]) -> bool:
    return any(text[i : i + len(option)] == option for i in range(len(text) - len(option) + 1))
