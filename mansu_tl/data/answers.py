"""Where an answer meets its prompt: the text that the two make together, and the tokens on either side of the seam."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Literal

from transformers import PreTrainedTokenizerBase

from mansu_tl.data.text import encode
from mansu_tl.errors import MansuError

if TYPE_CHECKING:
    AnswerSpace = Literal["auto"] | bool
else:
    AnswerSpace = object  # anything else is told what to choose

# Punctuation that stands against the word before it.
_CLOSING = frozenset(".,:;!?%…。、，．：；！？％")
_SUFFIX = re.compile(r"(['’](s|re|ve|ll|d|m|t)|n['’]t)\b", re.IGNORECASE)
# <answer>, <|assistant|>: markers of a template, not </b>, which closes.
_MARKER = re.compile(r"<[^<>\s/][^<>\s]*>$")
_GLUED = frozenset("-‐‑–—=")
_OPEN_ENDED = frozenset("/\\_#@")
_CONTROL_ENDS = frozenset(">]}|")
_QUOTES = frozenset("\"'`")
# First and last code points of scripts that put no space between words, with their punctuation and full-width forms.
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x303F), (0x3041, 0x312F), (0x31A0, 0x4DBF),
    (0x4E00, 0xA4CF), (0xF900, 0xFAFF), (0xFE30, 0xFE4F), (0xFF01, 0xFF9F), (0x20000, 0x3FFFF),
)  # fmt: skip


def joined(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, answer_space: AnswerSpace = "auto") -> str:
    """The prompt and its answer as one text; everything in this package that joins the two does it here.

    "auto" puts a space between them as a writer would: none where either side brings white space, after an opening quote
    or bracket, a control token or marker of a chat template, a digit that another follows, or a script that has no
    spaces between words, and none before punctuation that closes. True puts one in where there is none, False never.
    """
    if answer_space == "auto":
        space = _spaced(prompt, answer) and not _ends_in_control_token(tokenizer, prompt)
    else:
        space = answer_space and not prompt.endswith(" ") and not answer.startswith(" ")
    return f"{prompt} {answer}" if space else prompt + answer


def seam(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answer: str,
    what: str = "answer",
    answer_space: AnswerSpace = "auto",
    alone: list[int] | None = None,
) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and of the answer in their joint text, no BOS token in front.

    White space at the prompt's end may belong to the answer's first token there ("is " and "Paris" are "is", " Paris"
    to most tokenizers); the prompt is then that much shorter.

    Args:
        what: what errors call the answer.
        answer_space: as `joined`.
        alone: the tokens of the prompt by itself, where they are known.

    Raises:
        MansuError: another part of the prompt shares a token with the answer.
    """
    alone = encode(tokenizer, prompt, False) if alone is None else alone
    both = encode(tokenizer, joined(tokenizer, prompt, answer, answer_space), False)
    if both[: len(alone)] == alone:
        return alone, both[len(alone) :]
    if prompt[-1:].isspace():
        wanted = _text(tokenizer, alone).rstrip()
        for cut in range(len(both), -1, -1):
            if _text(tokenizer, both[:cut]).rstrip() == wanted:
                return both[:cut], both[cut:]
    names = tokenizer.convert_ids_to_tokens
    raise MansuError(
        f"{what} {answer!r} joins the end of {prompt!r} in one token ({names(alone)} becomes {names(both)}); end the "
        "prompt elsewhere, or set answer_space"
    )


def continuation(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answer: str,
    what: str,
    answer_space: AnswerSpace = "auto",
    alone: list[int] | None = None,
    *,
    most_tokens: int | None = None,
) -> tuple[list[int], list[int]]:
    """As `seam`, for an answer that the tokenizer can write.

    Args:
        most_tokens: that it may have.

    Raises:
        MansuError: as `seam`, or `answer` continues the prompt as too many tokens, as none, or as the unknown token.
    """
    before, new = seam(tokenizer, prompt, answer, what, answer_space, alone)
    if not new or (most_tokens is not None and len(new) > most_tokens):
        asked = "that the tokenizer writes" if not new else f"of at most {most_tokens} tokens"
        raise MansuError(
            f"{what} {answer!r} continues {prompt!r} as {len(new)} tokens {tokenizer.convert_ids_to_tokens(new)}; "
            f"choose an answer {asked}"
        )
    if tokenizer.unk_token_id in new and answer.strip() != tokenizer.unk_token:
        raise MansuError(
            f"{what} {answer!r} is unknown to the tokenizer after {prompt!r}; choose one that it can write"
        )
    return before, new


def require_answer_space(value: object, what: str) -> None:
    """Refuse anything but "auto", True and False.

    Raises:
        MansuError: another value.
    """
    if not isinstance(value, bool) and value != "auto":
        raise MansuError(f'{what}: answer_space is {value!r}; choose "auto", true or false')


def _spaced(prompt: str, answer: str) -> bool:
    """Whether a writer puts a space between the two."""
    last, first = prompt[-1:], answer[:1]
    if not last or not first or last.isspace() or first.isspace():
        return False
    if _MARKER.search(prompt) or last in _OPEN_ENDED or _unspaced(last):
        return False
    if unicodedata.category(last) in ("Ps", "Pi") or last in "<‚„" or (last in _QUOTES and _opens(prompt)):
        return False
    if last.isdigit() and first.isdigit():
        return False
    if unicodedata.category(last) == "Sc" and first.isdigit():
        return False
    if last in _GLUED and prompt[-2:-1].isalnum():
        return False
    return not _attached(prompt, answer)


def _attached(prompt: str, answer: str) -> bool:
    """Whether an answer stands against the word before it: closing punctuation, 's, a combining mark."""
    first = answer[0]
    if unicodedata.category(first) in ("Pe", "Pf", "Mn", "Mc", "Me") or _SUFFIX.match(answer):
        return True
    if first in _QUOTES and first != "'":
        return prompt.count(first) % 2 == 1
    return first in _CLOSING and not answer[1:2].isalnum()


def _opens(prompt: str) -> bool:
    """Whether the straight quote at a prompt's end opens rather than closes."""
    quote, before = prompt[-1], prompt[-2:-1]
    if not before or before.isspace() or before == "=" or unicodedata.category(before) in ("Ps", "Pi"):
        return True
    if quote == "'":
        return before in ":,;-" or (before == quote and prompt.count(quote) % 2 == 1)
    return not before.isdigit() and before not in ".!?" and prompt.count(quote) % 2 == 1


def _unspaced(letter: str) -> bool:
    return any(low <= ord(letter) <= high for low, high in _UNSPACED)


def _ends_in_control_token(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Whether a prompt ends in an added token that is no word: what chat templates are made of."""
    if prompt[-1:] not in _CONTROL_ENDS:
        return False  # before the added tokens are listed, of which some tokenizers have thousands
    names = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return prompt.endswith(tuple(name for name in names if name and name[-1] in _CONTROL_ENDS))


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
