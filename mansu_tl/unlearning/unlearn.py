"""A model and a task in, an edit out."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from os import PathLike
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.data import Task
from mansu_tl.data.fit import require_fit, require_task
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint, require_copyable
from mansu_tl.models.kinds import require_bridge
from mansu_tl.results.digest import digest
from mansu_tl.results.result import bars
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.registry import method_flags, settings_of


@torch_defaults()
def unlearn(
    model: TransformerBridge,
    task: Task,
    method: str = "mansu",
    *,
    circuit: Circuit | None = None,
    settings: Any | None = None,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | PathLike[str] | None = None,
    data_parallel: bool = False,
    **overrides: Any,
) -> Edit:
    """Unlearn the task's forget set and return the change as an edit; the model is untouched.

    Args:
        method: one of `methods()`.
        circuit: restricts methods that take one (MANSU); the others train every parameter.
        settings: the method's settings; its defaults where not given.
        seed: of every random choice; the same seed gives the same edit.
        progress: show a progress bar; None = in notebooks.
        checkpoint: a file in which the state is kept every twenty seconds. The same call goes on from there after an
            interruption, to the same edit; the file is deleted at the end.
        data_parallel: share the prompts and the text out over the processes of `torch.distributed` ("mansu-closed"). Every
            process calls this with the same model and task and gets the same edit.
        overrides: single settings by name, e.g. `budget=0.01`; those of the shared training too.

    Raises:
        MansuError: an unknown method or setting, no hooked model, no task, one that does not fit the model, or a model that
            `require_copyable` refuses.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> edit = mtl.unlearn(model, task, "graddiff", seed=0, max_steps=2)
        >>> edited = edit.apply(model)
    """
    chosen = method_flags(method)
    require_bridge(model)
    require_task(task)
    require_copyable(model, task.forget_pairs.clean)
    for part in (task.forget_pairs, task.retain_text, task.near_text, task.unseen):
        require_fit(model, part)
    final = settings_of(method, overrides, settings)
    extra: dict[str, Any] = {"circuit": circuit} if chosen.takes_circuit else {}
    if data_parallel:
        if not chosen.shares:
            raise MansuError(f"{method}: data_parallel=True, but its steps are not shared over processes; leave it out")
        extra["data_parallel"] = True
    key = ""
    if checkpoint is not None:
        read = {"model": fingerprint(model), "task": task, "settings": final, "circuit": extra.get("circuit")}
        key = digest({**read, "method": method, "seed": seed, "version": version("mansu-tl")})
    kept = Checkpoint(checkpoint, key)
    edit = chosen.run(model, task, final, seed=seed, progress=bars(progress), checkpoint=kept, **extra)
    kept.done()
    return replace(edit, method=method)
