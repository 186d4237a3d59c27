"""What the demo's report shows beside a study: what the models say, and what comes back when facts are learnt again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mansu_tl.data.sources import load_task
from mansu_tl.models import load
from mansu_tl.quantization import quantize
from mansu_tl.results.store import Store
from mansu_tl.study.shipping import first_texts
from mansu_tl.study.study import Study
from mansu_tl.unlearning import headline, method_title
from mansu_tl.verification import Relearning, SideBySide, ask, attack_splits, compare_relearning

# One draw of the facts that the attacker has, at both learning rates of the comparison's attacks.
_SPLITS, _STEPS, _OF_EACH = 1, 50, 3


@dataclass(frozen=True)
class Further:
    """What stands in a report beside what the study measured; None where it was not measured.

    Attributes:
        answers: what the models say.
        relearning: the attack by fine-tuning.
    """

    answers: SideBySide | None = None
    relearning: Relearning | None = None


def further_of(study: Study, *, progress: bool = True) -> Further:
    """Ask the leading method's model and the first other one's, and attack them by fine-tuning on some of the facts.

    The attack is made where the study names a model that never learnt the facts. Both are kept in the study's folder.
    """
    config, first = study.config, study.config.quantizers[0]
    main = headline(study.results)
    shown = [*[name for name in study.results if name != main][:1], main]
    key = {
        "edits": [study.results[name].edit.digest() for name in shown],
        "task": config.task,
        "model": config.model,
        "never": config.never,
        "quantizer": first,
        "seed": config.seed,
    }
    store = Store(Path(study.folder))
    model = load(config.model, device=config.device)
    task = load_task(config.task, tokenizer=model)
    edited = {method_title(name): study.results[name].edit.apply(model) for name in shown}

    def said() -> SideBySide:
        asked = {"original": model}
        for title, one in edited.items():
            asked |= {title: one, f"{title}, {first}": quantize(one, first, task.retain_text)}
        texts = [text for name in ("forget", "near") for text in first_texts(model, task.questions.get(name), _OF_EACH)]
        return ask(asked, texts, new_tokens=1)

    def attacked() -> Relearning:
        models = {**edited, "never trained": load(config.never, device=config.device)}
        splits = attack_splits(task, splits=_SPLITS, seed=config.seed)
        return compare_relearning(
            models, splits, reference="never trained", steps=_STEPS, seed=config.seed, progress=progress
        )

    return Further(
        store.result("scores/answers", SideBySide, key, said),
        store.result("scores/relearning", Relearning, key, attacked) if config.never else None,
    )
