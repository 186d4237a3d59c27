"""The tokenizer in a GGUF file: transformers builds it, from the head that is read already."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mansu_tl.errors import MansuError
from mansu_tl.models.gguf.file import GgufFile
from mansu_tl.models.quiet import quiet

_THEIRS = "transformers.integrations.gguf"


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a file, as transformers builds it; None where the file has none.

    Raises:
        MansuError: transformers cannot build it.
    """
    if "tokenizer.ggml.tokens" not in file.metadata:
        return None
    try:
        with quiet(), _quicker(file):
            return PreTrainedTokenizerFast(gguf_file=file.path.name, name_or_path=str(file.path.parent))
    except (ValueError, KeyError, OSError) as error:
        raise MansuError(f"{file.path}: its tokenizer cannot be read ({error}); pass tokenizer=") from None


def merges(
    vocab: Mapping[str, int],
    vocab_scores: Mapping[str, int | float] | None = None,
    skip_tokens: Collection[str] | None = None,
) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best first: transformers' `generate_merges`, in half the time.

    Args:
        vocab: the index of every token.
        vocab_scores: how good each is, higher is better, all different; None = their indices, lower is better.
        skip_tokens: tokens that are no part of a merge.
    """
    scores = vocab if vocab_scores is None else vocab_scores
    skipped = frozenset(skip_tokens or ())
    known = vocab.keys() - skipped if skipped else vocab
    better = vocab_scores is not None
    best_first = (token for token in sorted(scores, key=scores.__getitem__, reverse=better) if token not in skipped)
    return [
        (left, right)
        for token in best_first
        for cut in (range(len(token) - 1, 0, -1) if better else range(1, len(token)))
        if (left := token[:cut]) in known and (right := token[cut:]) in known
    ]


@contextmanager
def _quicker(file: GgufFile) -> Iterator[None]:
    """What transformers does slowly for large vocabularies, done quickly inside, with the same outcome.

    It reads the head once more and looks for merges token by token. Both functions are internals of it: a version that
    calls them otherwise does the work itself.
    """
    with ExitStack() as replaced:
        for module, name, parameters, ours in _replacements(file):
            try:
                theirs = getattr(import_module(f"{_THEIRS}.{module}"), name)
            except (ImportError, AttributeError):
                continue
            if list(inspect.signature(theirs).parameters) == parameters:
                replaced.enter_context(patch(f"{_THEIRS}.{module}.{name}", ours(theirs)))
        yield


def _replacements(file: GgufFile) -> list[tuple[str, str, list[str], Callable[..., Any]]]:
    """Module, name and parameters of a function, and what makes its replacement of it."""

    def head(theirs: object) -> Callable[..., Any]:
        return lambda gguf_path, string_arrays=(): (dict(file.metadata), tuple(file.tensors))

    def found(theirs: Callable[..., Any]) -> Callable[..., Any]:
        def generate(vocab: Any, vocab_scores: Any = None, skip_tokens: Any = None) -> Any:
            scores = vocab if vocab_scores is None else vocab_scores
            distinct = len(set(scores.values())) == len(scores)
            return (merges if distinct else theirs)(vocab, vocab_scores, skip_tokens)

        return generate

    return [
        ("reader", "read_gguf_metadata", ["gguf_path", "string_arrays"], head),
        ("gguf_tokenizer_mapping", "generate_merges", ["vocab", "vocab_scores", "skip_tokens"], found),
    ]
