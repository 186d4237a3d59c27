"""Prompts that were found on one model, put to another: what they say of a model that they were not made for."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.data import Questions
from mansu_tl.data.fit import require_questions
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import float32_copy, require_copyable
from mansu_tl.verification.prompting import asked_in_folds, trained_losses
from mansu_tl.verification.soft_prompt import SoftPrompt, put_embeddings
from mansu_tl.verification.suffix import AdversarialSuffix, put_tokens

P = TypeVar("P", SoftPrompt, AdversarialSuffix)


@torch_defaults()
def ask_behind(
    prompt: P, model: TransformerBridge | PreTrainedModel, questions: Questions, *, label: str = "edited"
) -> P:
    """Ask another model behind the same prompts: soft ones, or suffixes of tokens.

    Args:
        prompt: what `soft_prompt` or `adversarial_suffix` found.
        questions: those that the prompts were made with.
        label: what the other model is, for tables.

    Returns:
        The same prompts with this model's answers; its loss before and behind "training" is the same.

    Raises:
        MansuError: other questions, a model of another width or vocabulary, or questions that do not fit it with the
            prompt in them.
    """
    require_questions(questions)
    if questions.facts != prompt.facts:
        attack = "soft prompt" if isinstance(prompt, SoftPrompt) else "adversarial suffix"
        raise MansuError(f"{attack}: these are not the questions that the prompts were made with; pass the same")
    require_copyable(model, questions.prompts)
    hf = float32_copy(model)
    if isinstance(prompt, SoftPrompt):
        put = put_embeddings(hf, prompt.prompts, questions)
    else:
        put = put_tokens(hf, prompt.suffixes, questions, prompt.place)
    loss = trained_losses(hf, prompt.fold, put)
    answers = asked_in_folds(hf, prompt.fold, put)
    return replace(
        prompt,
        label=label,
        loss=torch.stack([loss, loss], 1),
        multiple_choice=answers["multiple_choice"],
        cloze=answers["cloze"],
        log_odds=answers["log_odds"],
    )
