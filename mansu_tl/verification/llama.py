"""llama.cpp as the judge: what it answers from a GGUF file, beside what this package answers from the same file.

It is not asked for text, which it would cut into tokens in its own way: it is given our token ids, and its raw logits are
read. Its products are not ours: activations are rounded to 8 bits where weights are in codes, keys and values to 16. So a
question whose two best options lie close together may be answered otherwise; the table says how many are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mansu_tl.data import Questions
from mansu_tl.data.fit import require_questions
from mansu_tl.data.text import pad_id, text_source
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import load
from mansu_tl.models.gguf import GgufFile
from mansu_tl.models.packages import PACKAGED, packaged_file
from mansu_tl.results.files import local
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import Accuracy, accuracy
from mansu_tl.verification.writing import greedy_answers, writing_copy


@dataclass(frozen=True)
class JudgedFile:
    """One file, read here and by llama.cpp.

    Attributes:
        name: what it is called.
        ours: how this package answers from it.
        llama: how llama.cpp does.
        ours_says: this package's greedy continuation of each prompt.
        llama_says: llama.cpp's.
    """

    name: str
    ours: Accuracy
    llama: Accuracy
    ours_says: tuple[str, ...]
    llama_says: tuple[str, ...]


@dataclass(frozen=True)
class LlamaJudgement(Result):
    """Files, judged by llama.cpp question by question.

    Attributes:
        prompts: the questions' prompts as text.
        files: what was found of each file.
    """

    prompts: tuple[str, ...]
    files: tuple[JudgedFile, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a file and question: both verdicts of each program, log-odds in nats, and what each says."""
        frames = []
        for one in self.files:
            both = {"ours": (one.ours, one.ours_says), "llama": (one.llama, one.llama_says)}
            columns: dict[str, Any] = {"file": one.name, "fact": one.ours.facts, "prompt": self.prompts}
            for name, (answers, says) in both.items():
                columns |= {
                    f"{name}_MC": answers.multiple_choice.tolist(),
                    f"{name}_cloze": answers.cloze.tolist(),
                    f"{name}_log_odds": answers.log_odds.tolist(),
                    f"{name}_says": says,
                }
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """One row a file: percent right by each program, and on how many percent of the questions both agree."""
        rows = []
        for one in self.files:
            row: dict[str, Any] = {"file": one.name}
            for kind, key in (("MC", "multiple_choice"), ("cloze", "cloze")):
                ours, llama = (getattr(answers, key) for answers in (one.ours, one.llama))
                row |= {f"{kind}, ours": _percent(ours), f"{kind}, llama.cpp": _percent(llama)}
                row[f"{kind}, agree"] = _percent(ours == llama)
            same = torch.tensor([a == b for a, b in zip(one.ours_says, one.llama_says, strict=True)])
            rows.append(row | {"says the same": _percent(same)})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        least = self.summary()["MC, agree"].min()
        return (
            f"LlamaJudgement({len(self.files)} files, {len(self.prompts)} questions: llama.cpp and we agree on {least:.1f} % "
            "and more of the MC answers)"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.summary(), "percent", "{:.1f}".format, rows=len(self.files)),)


@torch_defaults()
def judge_by_llama(
    files: str | PathLike[str] | Mapping[str, str | PathLike[str]], questions: Questions, *, new_tokens: int = 4
) -> LlamaJudgement:
    """Ask llama.cpp what it answers from GGUF files, and compare with what this package answers from them.

    Options are compared by their mean log-probability per token, which for options of one token is the order of their
    logits. Needs the extra `mansu-tl[llama]`.

    Args:
        files: one GGUF file (or the name of a packaged model), or several by the name of their row: the original, a
            baseline, MANSU's.
        questions: of a task that was read with the files' own tokenizer.
        new_tokens: length of the greedy continuations.

    Raises:
        MansuError: llama-cpp-python is not installed, it cannot read a file, no question, or a file that `load` refuses.
    """
    _require_package()
    named = dict(files) if isinstance(files, Mapping) else {Path(files).stem: files}
    require_questions(questions)
    if not named or not len(questions) or new_tokens < 1:
        raise MansuError(
            f"llama.cpp: {len(named)} files, {len(questions)} questions, new_tokens={new_tokens}; give at least one of each"
        )
    places = {name: packaged_file(str(path)) if path in PACKAGED else local(path) for name, path in named.items()}
    for path in places.values():
        GgufFile.read(path)  # before any of them is loaded
    prompts = [row[:length].tolist() for row, length in zip(questions.prompts, questions.lengths.tolist(), strict=True)]
    judged, texts = [], [""] * len(prompts)
    for name, path in places.items():
        model = load(path)
        tokenizer, _ = text_source(model)
        ours = accuracy(model, questions)
        written = greedy_answers(
            writing_copy(model, name), prompts, pad_id(tokenizer), tokenizer.eos_token_id, new_tokens
        )
        del model
        llama = _Llama(path, max(map(len, prompts)) + max(new_tokens, questions.options.shape[2]))
        answers = llama.accuracy(questions, prompts)
        theirs = [llama.greedy(ids, new_tokens, tokenizer.eos_token_id) for ids in prompts]
        llama.close()
        texts = tokenizer.batch_decode(prompts)
        judged.append(
            JudgedFile(name, ours, answers, *(tuple(tokenizer.batch_decode(ids)) for ids in (written, theirs)))
        )
    return LlamaJudgement(tuple(texts), tuple(judged))


class _Llama:
    """A file in llama.cpp."""

    def __init__(self, path: Path, positions: int) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        try:
            self._llm: Any = Llama(
                fspath(path),
                n_gpu_layers=0,
                n_ctx=positions,
                n_batch=positions,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=True,
                swa_full=True,  # earlier positions stay, so that several options go on from one prompt
                verbose=False,
            )
        except ValueError as error:
            raise MansuError(f"{path}: llama.cpp cannot read it ({error}); convert it again") from None

    def close(self) -> None:
        """Give its memory back."""
        self._llm.close()

    def _logits(self, keep: int, tokens: Sequence[int]) -> Float[Tensor, "token vocab"]:
        """Logits at each of the tokens, which stand behind the first `keep` of those that were run before."""
        self._llm.n_tokens = keep
        self._llm.eval(list(tokens))
        return torch.from_numpy(self._llm.scores[keep : keep + len(tokens)].copy())

    def accuracy(self, questions: Questions, prompts: Sequence[list[int]]) -> Accuracy:
        """How llama.cpp answers, by the rules of `mansu_tl.accuracy`."""
        right, cloze, odds = [], [], []
        for ids, options in zip(prompts, questions.options.tolist(), strict=True):
            first = self._logits(0, ids)[-1:]
            scores = []
            for i, padded in enumerate(options):
                option = [token for token in padded if token >= 0]
                behind = self._logits(len(ids), option[:-1]) if len(option) > 1 else first[:0]
                logits = torch.cat([first, behind])
                at = torch.tensor(option)
                scores.append(logits.log_softmax(-1).gather(1, at[:, None]).mean())
                if i == 0:
                    cloze.append(bool((logits.argmax(-1) == at).all()))
            values = torch.stack(scores)
            right.append(bool(values[0] > values[1:].max()))
            odds.append(values[0] - values[1:].logsumexp(0))
        return Accuracy(torch.tensor(right), torch.tensor(cloze), torch.stack(odds), questions.facts)

    def greedy(self, prompt: list[int], new_tokens: int, end: int | None) -> list[int]:
        """The greedy continuation, without the end-of-sequence token."""
        said: list[int] = []
        logits = self._logits(0, prompt)
        while (best := int(logits[-1].argmax())) != end:
            said.append(best)
            if len(said) == new_tokens:
                break
            logits = self._logits(len(prompt) + len(said) - 1, [best])
        return said


def _percent(values: Tensor) -> float:
    return 100 * values.double().mean().item()


def _require_package() -> None:
    if find_spec("llama_cpp") is None:
        raise MansuError(
            "llama.cpp: llama-cpp-python is not installed; pip install 'mansu-tl[llama]' (it is built from source, in about "
            "five minutes)"
        )
