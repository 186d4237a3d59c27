"""What the gallery's pictures need from a finished study: its own results, and a few more that its models still give.

This is the step that computes; `mansu_tl.gallery` draws from the files alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from mansu_tl.circuit import edge_attribution, faithfulness_curve
from mansu_tl.config import StudyConfig
from mansu_tl.data import PromptPairs
from mansu_tl.data.sources import load_task
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, home, linear_weights, load, orient, parameters
from mansu_tl.patching import activation_patching, node_attribution
from mansu_tl.quantization import quantize
from mansu_tl.results.files import write_packed, write_text
from mansu_tl.study import MethodResult, Study, run_study
from mansu_tl.unlearning import headline, method_title
from mansu_tl.verification import attack_splits, compare_relearning, erasure_depth, probe

_PAIRS = 48
_RULED = 64  # rows of the ruled matrix that are kept


def collect(run: str | PathLike[str], out: str | PathLike[str], *, progress: bool = True) -> list[Path]:
    """Write the results behind the gallery's pictures into one folder, about a megabyte.

    Takes the study's scores, circuit, sweep, divergences, scorecards, update statistics and certificate as they are; and
    computes, with the study's models, scores by node and by token, exact patching of all heads, attention patterns, the
    faithfulness curve, relearning, probes and depth (those against a never-trained model only where the study names one).
    Store of the study that are missing or out of date are run first.

    Args:
        run: results folder of `mansu-tl demo` or `mansu-tl run`.
        out: e.g. figures/results.
        progress: show bars.

    Raises:
        MansuError: `run` is no results folder.
    """
    folder, target = Path(run), Path(out)
    if not (folder / "config.toml").is_file():
        raise MansuError(f"{folder}: no config.toml in it, so it is no results folder; give the --out of a run")
    study = run_study(StudyConfig.read(folder / "config.toml"), folder, progress=progress)
    written = [*_of_study(study, target), *_of_models(study, target, progress)]
    written.append(write_text(target / "environment.json", json.dumps(study.environment, indent=2)))
    return written


def _of_study(study: Study, target: Path) -> list[Path]:
    """What the study has already."""
    out = [
        study.scores.save(target / "scores.safetensors"),
        study.circuit.save(target / "circuit.safetensors"),
        study.patching.save(target / "patching.safetensors"),
        write_text(target / "summary.csv", study.summary().to_csv(index=False)),
        write_text(target / "study.json", json.dumps(_facts(study), indent=2)),
    ]
    for i, divergence in enumerate(study.references.values()):
        out.append(divergence.save(target / f"references/{i}.safetensors"))
    for base, one in {"": study, **study.also}.items():
        for method, result in one.results.items():
            out += _of_method(result, target / "also" / base / method if base else target / "methods" / method)
    return out


def _of_method(result: MethodResult, target: Path) -> list[Path]:
    out = [result.card.save(target / "scorecard.safetensors"), result.statistics.save(target / "updates.safetensors")]
    for name, divergence in result.divergences.items():
        out.append(divergence.save(target / f"cad_{name or 'full'}.safetensors"))
    if result.certificate is not None:
        out.append(result.certificate.save(target / "certificate.json"))
    return out


def _facts(study: Study) -> dict[str, object]:
    """Names and order, for titles."""
    config = study.config
    return {
        "model": study.name,
        "chance": _chance(study),
        "quantizers": list(config.quantizers),
        "methods": {method: method_title(method) for method in study.results},
        "also": list(study.also),
        "never": config.never,
        "references": list(study.references),
        "random_faithfulness": study.random_faithfulness,
    }


def _chance(study: Study) -> float:
    """Multiple choice on the forget questions by guessing, in percent."""
    card = next(iter(study.results.values())).card
    return next(row.chance for row in card.rows if row.measure == "forget MC, %" and row.chance is not None)


def _of_models(study: Study, target: Path, progress: bool) -> list[Path]:
    """What a study does not keep."""
    config = study.config
    model = load(config.model)
    task = load_task(config.task, tokenizer=model)
    pairs = task.forget_pairs
    alike, words = _one_wording(model.tokenizer.decode, pairs)
    result = study.results[headline(study.results)]
    edited = result.edit.apply(model)
    title = method_title(result.edit.method)
    nf4 = quantize(edited, config.quantizers[0], task.retain_text)
    out = [
        node_attribution(model, pairs, steps=config.steps).save(target / "nodes.safetensors"),
        node_attribution(model, pairs).save(target / "nodes_linear.safetensors"),
        activation_patching(model, pairs, component="z", by="head").save(target / "heads.safetensors"),
        edge_attribution(model, alike, steps=config.steps, per_position=True).save(target / "tokens.safetensors"),
        faithfulness_curve(model, study.scores, pairs, control_seeds=3).save(target / "curve.safetensors"),
    ]
    _, cache = model.run_with_cache(
        alike.clean[:1].to(home(model)), names_filter=list(hooks := Anatomy.of(model).hooks("pattern").values())
    )
    patterns = {str(i): cache[name][0] for i, name in enumerate(hooks)}
    out.append(write_packed(target / "attention.safetensors", "Attention", patterns, {"tokens": words}))
    # The matrix with most edited weights, its most edited rows.
    before, after, linear = parameters(model), parameters(edited), linear_weights(model)
    name = max((n for n in result.edit.indices if n in linear), key=lambda n: result.edit.indices[n].numel())
    old, new = (orient(each[name], linear[name]).detach().cpu() for each in (before, after))
    rows = (old != new).sum(1).topk(min(_RULED, old.shape[0])).indices.sort().values
    ruled = {"before": old[rows].float(), "after": new[rows].float()}
    out.append(write_packed(target / "ruled.safetensors", "Ruled", ruled, {"name": name, "grid": config.quantizers[0]}))
    probes = {"original": model, title: edited}
    if config.never:
        never = load(config.never)
        probes["never trained"] = never
        out.append(erasure_depth(model, edited, never, pairs, label=title).save(target / "depth.safetensors"))
    for i, (label, each) in enumerate(probes.items()):
        found = probe(each, task.questions["forget"], also_train=task.questions.get("near"), label=label)
        out.append(found.save(target / f"probes/{i}.safetensors"))
    if config.never:
        attacked = {title: edited, f"{title}, {config.quantizers[0]}": nf4, "never trained": never}
        relearnt = compare_relearning(
            attacked, attack_splits(task), reference="never trained", seed=config.seed, progress=progress
        )
        out.append(relearnt.save(target / "relearning.safetensors"))
    return out


def _one_wording(decode: Callable[[list[int]], str], pairs: PromptPairs) -> tuple[PromptPairs, list[str]]:
    """Pairs of the commonest wording, so that positions mean something, and the words of the first."""
    alike, constant = pairs.one_wording()
    words = [
        decode([token]).strip() or "_" if same else f"({decode([token]).strip()})"
        for token, same in zip(alike.clean[0].tolist(), constant.tolist(), strict=True)
    ]
    return alike[slice(0, _PAIRS)], words
