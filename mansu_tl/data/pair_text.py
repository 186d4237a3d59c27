"""From the texts of pairs to their tokens, every pair checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from mansu_tl.data.answers import continuation, require_answer_space, seam
from mansu_tl.data.text import encode, require_text, side_by_side, span_of, with_bos
from mansu_tl.errors import MansuError


@dataclass(frozen=True)
class PairTokens:
    """One pair as tokens; option 0 is the answer."""

    clean: list[int]
    corrupt: list[int]
    options: list[list[int]]


def read_pairs(
    tokenizer: PreTrainedTokenizerBase, bos: bool, names: Sequence[str], rows: Sequence[Sequence[Any]]
) -> list[PairTokens]:
    """Rows of clean, corrupt (None = the clean tokens), answer, distractors (one or several) and answer_space as tokens.

    Raises:
        MansuError: see `PromptPairs.from_text`.
    """
    if not rows:
        raise MansuError("prompt pairs: none given; pass at least one clean/corrupt pair")
    pairs = [_pair(tokenizer, bos, names[i] if names else f"pair {i}", *row) for i, row in enumerate(rows)]
    counts = {len(pair.options) - 1 for pair in pairs}
    if len(counts) != 1:
        raise MansuError(f"prompt pairs: pairs have {sorted(counts)} distractors; give every pair the same number")
    return pairs


def _pair(
    tokenizer: PreTrainedTokenizerBase,
    bos: bool,
    name: str,
    clean: Any,
    corrupt: Any,
    answer: Any,
    distractors: Any,
    answer_space: Any,
) -> PairTokens:
    require_answer_space(answer_space, name)
    several = isinstance(distractors, Iterable) and not isinstance(distractors, str)
    texts = [("answer", answer), *(("distractor", text) for text in (distractors if several else [distractors]))]
    for what, text in (("clean", clean), *([] if corrupt is None else [("corrupt", corrupt)]), *texts):
        require_text(text, f"{name}: {what}")
    if len(texts) == 1:
        raise MansuError(f"{name}: no distractor; give at least one wrong answer")
    alone = encode(tokenizer, clean, False)
    before: list[int] = []
    options: dict[tuple[int, ...], str] = {}
    for what, text in texts:
        start, ids = continuation(tokenizer, clean, text, f"{name}: {what}", answer_space, alone)
        if tuple(ids) in options:
            shown = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
            raise MansuError(
                f"{name}: {what} {text!r} and {options[tuple(ids)]} are the same token{'s' * (len(ids) > 1)} {shown}; give "
                "every option once"
            )
        if options and start != before:
            raise MansuError(
                f"{name}: the prompt ends elsewhere before {text!r} than before {answer!r}; end it without white space"
            )
        before = start
        options[tuple(ids)] = f"{what} {text!r}"
    if corrupt is None:
        ids = with_bos(tokenizer, before, bos)
        return PairTokens(ids, ids, [list(option) for option in options])
    other = encode(tokenizer, corrupt, False)
    if corrupt[-1].isspace():
        other = seam(tokenizer, corrupt, texts[1][1], f"{name}: distractor", answer_space, other)[0]
    rows = [with_bos(tokenizer, ids, bos) for ids in (before, other)]
    if len(rows[0]) != len(rows[1]):
        raise MansuError(
            f"{name}: clean has {len(rows[0])} tokens, corrupt {len(rows[1])}: {side_by_side(tokenizer, *rows)}; "
            "choose a counterfactual of equal token length, or name the subject and leave the corrupt prompt out, to have it "
            "made (corruption=)"
        )
    if rows[0] == rows[1]:
        raise MansuError(
            f"{name}: clean {clean!r} and corrupt {corrupt!r} are the same tokens; change what the pair asks about"
        )
    return PairTokens(rows[0], rows[1], [list(ids) for ids in options])


def read_span(
    tokenizer: PreTrainedTokenizerBase,
    bos: bool,
    name: str,
    pieces: Sequence[str | tuple[str, str]],
    clean: Sequence[str],
    corrupt: Sequence[str],
    lengths: Sequence[int],
) -> list[tuple[int, int]]:
    """First and one past the last position of a span in every pair.

    Args:
        pieces: of each pair, the text that the span covers in both prompts, or in clean and in corrupt.

    Raises:
        MansuError: another number of pieces than pairs, or one that is not in its prompt once, or at other positions in
            clean and corrupt.
    """
    if len(pieces) != len(clean):
        raise MansuError(f"span {name!r}: {len(pieces)} pieces for {len(clean)} pairs; give one for each")
    places = []
    for i, piece in enumerate(pieces):
        a, b = (piece, piece) if isinstance(piece, str) else piece
        where = [span_of(tokenizer, t, p, f"pair {i}: span {name!r}:") for t, p in ((clean[i], a), (corrupt[i], b))]
        if where[0] != where[1]:
            raise MansuError(
                f"pair {i}: span {name!r} covers tokens {where[0][0]}..{where[0][1] - 1} of clean ({a!r}) and "
                f"{where[1][0]}..{where[1][1] - 1} of corrupt ({b!r}); it must cover the same in both"
            )
        shift = len(encode(tokenizer, clean[i], bos)) - len(encode(tokenizer, clean[i], False))
        # White space at the prompt's end may have gone to the answer.
        places.append((where[0][0] + shift, min(where[0][1] + shift, lengths[i])))
    return places
