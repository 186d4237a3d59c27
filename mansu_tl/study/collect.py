"""What the gallery's pictures need from a finished study: its own results, and a few more that its models still give.

This is the step that computes; the pictures are drawn from the files alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from mansu_tl.circuit import edge_attribution, faithfulness_curve
from mansu_tl.data.sources import load_task
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, home, load
from mansu_tl.patching import activation_patching, node_attribution
from mansu_tl.quantization import quantize
from mansu_tl.study.config import StudyConfig
from mansu_tl.study.kept import kept_of, ruled_of_models, write_kept
from mansu_tl.study.run import run_study
from mansu_tl.study.study import Study, in_one_wording
from mansu_tl.unlearning import headline, method_title
from mansu_tl.verification import attack_splits, compare_relearning, erasure_depth, probe


def collect(run: str | PathLike[str], out: str | PathLike[str], *, progress: bool = True) -> list[Path]:
    """Write the results behind the gallery's pictures into one folder, about a megabyte.

    Takes the study's scores, circuit, sweep, divergences, scorecards, update statistics and certificate as they are; and
    computes, with the study's models, scores by node and by token, exact patching of all heads, attention patterns, the
    faithfulness curve, relearning, probes and depth (those against a never-trained model only where the study names one).
    Stages of the study that are missing or out of date are run first.

    Args:
        run: results folder of `mansu-tl demo` or `mansu-tl run`.
        out: e.g. figures/results.
        progress: show bars.

    Raises:
        MansuError: `run` is no results folder.
    """
    study = run_study(StudyConfig.read(config_in(run)), run, progress=progress)
    computed = dict(_of_models(study, progress))
    return write_kept({**kept_of(study), **computed, "environment.json": study.environment}, Path(out))


def config_in(run: str | PathLike[str]) -> Path:
    """The config of a results folder.

    Raises:
        MansuError: it has none.
    """
    path = Path(run) / "config.toml"
    if not path.is_file() and (Path(run) / "audit.json").is_file():
        raise MansuError(
            f"{run}: the --out of an audit, which has no circuit of a study; its page is {Path(run) / 'report.html'}. Give "
            "the --out of mansu-tl demo, demo-real or run, or show a circuit with mtl.explore(model, ...)"
        )
    if not path.is_file():
        what = "no config.toml in it, so it is no results folder" if Path(run).is_dir() else "no such folder"
        if (Path(run) / "config.json").is_file():
            what = "a model's folder, no results folder"
        raise MansuError(
            f"{run}: {what}; give the --out of mansu-tl demo, demo-real or run, or show an edit of a model with "
            "mtl.explore(model, task, edit)"
        )
    return path


def _of_models(study: Study, progress: bool) -> Iterator[tuple[str, Any]]:
    """What a study does not keep."""
    config = study.config
    model = load(config.model, device=config.device)
    task = load_task(config.task, tokenizer=model)
    pairs = task.forget_pairs
    alike, words = in_one_wording(model, pairs)
    result = study.results[headline(study.results)]
    edited, title = result.edit.apply(model), method_title(result.edit.method)
    yield "nodes.safetensors", node_attribution(model, pairs, steps=config.steps)
    yield "nodes_linear.safetensors", node_attribution(model, pairs)
    yield "heads.safetensors", activation_patching(model, pairs, component="z", by="head")
    yield "tokens.safetensors", edge_attribution(model, alike, steps=config.steps, per_position=True)
    yield "curve.safetensors", faithfulness_curve(model, study.scores, pairs, control_seeds=3)
    hooks = list(Anatomy.of(model).hooks("pattern").values())
    _, cache = model.run_with_cache(alike.clean[:1].to(home(model)), names_filter=hooks)
    patterns = {str(i): cache[name][0] for i, name in enumerate(hooks)}
    yield "attention.safetensors", (patterns, {"tokens": words})
    yield from ruled_of_models(study, model, edited).items()
    probed = {"original": model, title: edited}
    if config.never:
        never = probed["never trained"] = load(config.never, device=config.device)
        yield "depth.safetensors", erasure_depth(model, edited, never, pairs, label=title)
        deployed = quantize(edited, config.quantizers[0], task.retain_text)
        attacked = {title: edited, f"{title}, {config.quantizers[0]}": deployed, "never trained": never}
        yield (
            "relearning.safetensors",
            compare_relearning(
                attacked, attack_splits(task), reference="never trained", seed=config.seed, progress=progress
            ),
        )
    for i, (label, each) in enumerate(probed.items()):
        near = task.questions.get("near")
        yield f"probes/{i}.safetensors", probe(each, task.questions["forget"], also_train=near, label=label)
