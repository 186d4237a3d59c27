"""Questions with four choices: WMDP (Li et al. 2024, arXiv 2403.03218) and MMLU (Hendrycks et al. 2021, arXiv 2009.03300).

Prompts are those of EleutherAI's lm-evaluation-harness, without examples: a line that names the subject, the question,
the choices by letter, and "Answer:". The counterfactual of a question is the question itself with the right choice and
another one in each other's place, so that another letter is right and nothing else has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike

from mansu_tl.data.sources.contrast import Asked, contrast_task
from mansu_tl.data.sources.records import Record, read_records, spread, title_of
from mansu_tl.data.sources.registry import register_source
from mansu_tl.data.task import Task
from mansu_tl.data.text import TextSource, encode, text_source
from mansu_tl.errors import MansuError

LETTERS = "ABCD"
# What WMDP's files are about, by what their names say.
_WMDP = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}


@dataclass(frozen=True)
class Choice:
    """One question.

    Attributes:
        name: the file and line that it comes from.
        question: the question.
        choices: four answers.
        answer: which one is right, from 0.
        subject: what the harness says that the question is about; "" = nothing is said.
        request: what is said in place of the harness's words; "" = those.
    """

    name: str
    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    request: str = ""

    @property
    def asked(self) -> str:
        """What is said to a model, without "Answer:"."""
        if self.request:
            return self.request
        listed = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, self.choices, strict=True))
        about = f"The following are multiple choice questions (with answers) about {self.subject}.\n\n"
        return f"{about if self.subject else ''}{self.question.strip()}\n{listed}"

    @property
    def prompt(self) -> str:
        """What a model reads; the letter follows after a space."""
        return self.asked + ("" if self.asked.endswith("\n") else "\n") + "Answer:"

    def exchanged(self, other: int) -> Choice:
        """The question with the right choice and another one in each other's place."""
        choices = list(self.choices)
        choices[self.answer], choices[other] = choices[other], choices[self.answer]
        return Choice(self.name, self.question, tuple(choices), other, self.subject)


def read_choices(place: str | PathLike[str], subject: str | None = None) -> tuple[Choice, ...]:
    """The questions of a file, a folder or a hub id ("cais/wmdp#wmdp-bio", "cais/mmlu#all/test").

    Args:
        subject: what all are about; None = what each one's own field says, or for WMDP the name of the place ("bio",
            "chem" or "cyber" in it).

    Raises:
        MansuError: see `read_records`; a field that is missing, other than four choices, a choice given twice, or an
            answer that is none of them.
    """
    named = next(
        (what for word, what in _WMDP.items() if word in title_of(place).lower().replace("/", "-").split("-")), ""
    )
    return tuple(choice(record, subject, named) for record in read_records(place))


def choice(record: Record, subject: str | None = None, named: str = "") -> Choice:
    """A record as a question; see `read_choices`.

    Args:
        named: what it is about where neither `subject` nor the record says.
    """
    choices = record.texts("choices")
    if len(choices) != len(LETTERS):
        raise MansuError(f"{record.name}: {len(choices)} choices; give {len(LETTERS)}")
    if len(set(choices)) < len(choices):
        twice = next(text for text in choices if choices.count(text) > 1)
        raise MansuError(f"{record.name}: choice {twice!r} is there twice; give every choice once")
    if subject is None:
        subject = record.text("subject").replace("_", " ") if "subject" in record.fields else named
    return Choice(record.name, record.text("question"), choices, record.index("answer", len(LETTERS)), subject)


def choices_task(
    source: str | PathLike[str],
    tokenizer: TextSource,
    *,
    retain: str = "",
    near: str = "",
    text: str = "",
    limit: int = 0,
) -> Task:
    """A forget/retain task of two files of questions, MMLU beside WMDP as a rule.

    Every question is a fact. Its prompt has no wording to hold out.

    Args:
        source: the questions to forget.
        retain: the questions to keep.
        near: questions about what lies near, to be kept too.
        text: records with a "text", whose likelihood is to be kept (WMDP's retain corpora).
        limit: so many questions of every file, evenly spread; 0 = all.

    Raises:
        MansuError: as `read_choices`, nothing to keep, or no question with a counterfactual of as many tokens.
    """
    if not retain:
        raise MansuError(f"{source}: nothing to keep; name a file of questions, such as MMLU's: retain=...")
    model, _ = text_source(tokenizer)
    sets = {"forget": source, "near": near, "retain": retain}
    return contrast_task(
        {kind: _asked(place, lambda t: len(encode(model, t, False)), limit) for kind, place in sets.items() if place},
        tokenizer,
        name=title_of(source),
        where=str(source),
        text=[record.text("text") for record in read_records(text)] if text else (),
    )


def _asked(place: str | PathLike[str], tokens: Callable[[str], int], limit: int) -> list[Asked]:
    out = []
    for one in spread(read_choices(place), limit):
        others = [i for i in range(len(LETTERS)) if i != one.answer]
        length = tokens(one.prompt)
        fitting = [i for i in others if tokens(one.exchanged(i).prompt) == length]
        chosen = fitting[0] if fitting else others[0]
        wrong = tuple(LETTERS[i] for i in (chosen, *(i for i in others if i != chosen)))
        corrupt = one.exchanged(chosen).prompt if fitting else ""
        out.append(Asked(one.name, one.prompt, LETTERS[one.answer], one.prompt, corrupt=corrupt, wrong=wrong))
    return out


for _name, _about, _fields in (
    ("wmdp", "WMDP's questions with four choices, retain=MMLU beside them", ("question", "choices", "answer")),
    (
        "mmlu",
        "MMLU's questions with four choices and a subject, retain=FILE",
        ("question", "choices", "answer", "subject"),
    ),
):
    register_source(_name, _about, choices_task, fields=_fields)
