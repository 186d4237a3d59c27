"""Last-token logits: right on bridges and plain models, and no other position is ever unembedded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mansu_tl as mtl
from mansu_tl.data import Questions
from mansu_tl.errors import MansuError
from mansu_tl.runs.metrics import last_logits
from tests.test_erasure import tiny_questions
from tests.tiny import FAMILIES, tiny, tiny_tokenizer


class Watched:
    """The shapes that come out of a model's output embedding."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 64]
        assert len(heads) == 1
        # Not by a hook: a model with a foreign hook is run on one prompt more, to see whether the hook changes it.
        forward = heads[0].forward

        def seen(inputs: torch.Tensor) -> torch.Tensor:
            out = forward(inputs)
            self.shapes.append(tuple(out.shape))
            return out

        heads[0].forward = seen


def expected(hf: nn.Module, questions: Questions) -> torch.Tensor:
    """Every position's logits of the plain model, then the last real one's."""
    with torch.no_grad():
        logits = hf(questions.prompts).logits
    return logits[torch.arange(len(questions)), questions.lengths - 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bridged", [True, False], ids=["bridge", "plain"])
def test_only_the_last_token_is_unembedded(family: str, bridged: bool) -> None:
    hf, questions = tiny(family), tiny_questions(12)
    model = mtl.load(hf) if bridged else hf
    wanted = expected(hf, questions)
    watched = Watched(model)
    got = last_logits(model, questions.prompts, questions.lengths, batch_size=5)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert not got.requires_grad
    answers = mtl.accuracy(model, questions, batch_size=5)
    assert watched.shapes == 2 * [(5, 1, 64), (5, 1, 64), (2, 1, 64)]
    options = wanted.gather(1, questions.choices)
    assert torch.equal(answers.multiple_choice, options.argmax(1) == 0)
    assert torch.equal(answers.cloze, wanted.argmax(1) == questions.choices[:, 0])
    log_odds = options[:, 0] - options[:, 1:].logsumexp(1)
    torch.testing.assert_close(answers.log_odds, log_odds, rtol=0, atol=1e-5)
    assert not answers.log_odds.requires_grad
    # Nothing stays behind: a plain call unembeds every position again.
    full = model(questions.prompts, return_type="logits") if bridged else model(questions.prompts).logits
    assert full.shape == (12, 7, 64)


@pytest.mark.parametrize("bridged", [True, False], ids=["bridge", "plain"])
def test_half_precision_answers_in_fp32(bridged: bool) -> None:
    hf, questions = tiny("llama").to(torch.bfloat16), tiny_questions(12)
    model = mtl.load(hf) if bridged else hf
    got = last_logits(model, questions.prompts, questions.lengths)
    assert got.dtype == torch.float32
    with torch.no_grad():
        full = model(questions.prompts, return_type="logits") if bridged else model(questions.prompts).logits
    wanted = full[torch.arange(12), questions.lengths - 1].float()
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)


def test_a_wrapper_with_an_output_embedding_is_asked_as_it_is() -> None:
    """Like peft's PeftModel, which hands on what it does not have itself."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: object, **options: object) -> object:
            return self.inner(*args, **options)

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.get_output_embeddings()

    hf, questions = tiny("llama"), tiny_questions(12)
    assert torch.equal(mtl.accuracy(Wrapper(hf).eval(), questions).log_odds, mtl.accuracy(hf, questions).log_odds)
    with pytest.raises(MansuError, match="got a Linear; pass a model from mtl.load"):
        mtl.accuracy(nn.Linear(2, 2), questions)


def test_an_error_leaves_no_hook_behind() -> None:
    hf, questions = tiny("llama"), tiny_questions(12)
    with torch.no_grad():
        hf.model.norm.weight[3] = float("nan")
    with pytest.raises(MansuError, match=r"logits of question 0 \(fact 0\) are not finite; check the weights"):
        mtl.accuracy(hf, questions)
    hf.model.forward = None  # the pass itself fails
    with pytest.raises(TypeError):
        mtl.accuracy(hf, questions)
    assert not hf.get_output_embeddings()._forward_pre_hooks


def test_the_question_that_is_not_finite_is_named_across_batches() -> None:
    model, questions = mtl.load(tiny("llama"), tokenizer=tiny_tokenizer()), tiny_questions(12)
    prompts = torch.full_like(questions.prompts, 5)
    prompts[7] = 6
    broken = tiny("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[6] = float("nan")
    asked = Questions(prompts, questions.lengths, questions.choices, questions.facts)
    with pytest.raises(MansuError, match=r"logits of question 7 \(fact 3\) are not finite; check the weights"):
        mtl.accuracy(broken, asked, batch_size=5)
    assert mtl.accuracy(model, asked, batch_size=5).log_odds.isfinite().all()
