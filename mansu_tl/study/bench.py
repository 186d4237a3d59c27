"""One base of a plan with everything that its cells share: model, task, circuit, what it says itself, and the store."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, EdgeScores, discover_circuit, edge_attribution
from mansu_tl.data.sources import load_task
from mansu_tl.data.split import split_questions
from mansu_tl.models import fingerprint, load
from mansu_tl.results.store import Store
from mansu_tl.study.measures import Measurements
from mansu_tl.study.plan import NEVER, ORIGINAL, Cell, Plan
from mansu_tl.unlearning import Edit, method_flags, settings_of, unlearn
from mansu_tl.unlearning.search import Search, search
from mansu_tl.verification import Subject, require_known
from mansu_tl.verification.cad_by_depth import CAD


class Bench:
    """A base, and its cells done on it; every stage is read where the folder has it.

    Args:
        plan: what is run.
        base: the model, as the plan names it.
        folder: the results folder.
        making: make what is missing; else ask for it in vain (`NotMadeError`).
        progress: show bars.

    Raises:
        MansuError: the model does not know what it is to forget, or what `load` and `load_task` refuse.
    """

    def __init__(self, plan: Plan, base: str, folder: Path, *, making: bool = True, progress: bool = False) -> None:
        self.plan, self.base, self.name, self.progress = plan, base, plan.names[base], progress
        self.store = Store(folder / plan.folder_of(base), shared=True, making=making)
        self.model = load(base, device=plan.device)
        task = load_task(plan.task, tokenizer=self.model)
        self.validation, self.task = split_questions(task) if plan.validated else (task, task)
        self.known = require_known(self.model, self.task)

    @cached_property
    def marks(self) -> dict[str, str]:
        """Digests of what every measurement reads."""
        return {"model": fingerprint(self.model), "task": self.task.digest(), "circuit": self.circuit.digest()}

    @cached_property
    def scores(self) -> EdgeScores:
        """Edge scores on the forget pairs."""
        pairs, steps = self.task.forget_pairs, self.plan.steps
        key = {"model": fingerprint(self.model), "pairs": pairs.digest(), "steps": steps}
        return self.store.result(
            "circuit/scores", EdgeScores, key, lambda: edge_attribution(self.model, pairs, steps=steps)
        )

    @cached_property
    def circuit(self) -> Circuit:
        """The forget circuit."""
        pairs, target = self.task.forget_pairs, self.plan.faithfulness
        key = {"model": fingerprint(self.model), "pairs": pairs.digest(), "scores": self.scores.digest()}
        return self.store.result(
            "circuit/circuit",
            Circuit,
            {**key, "faithfulness": target},
            lambda: discover_circuit(self.model, pairs, scores=self.scores, faithfulness=target),
        )

    @cached_property
    def original(self) -> Subject:
        """The base under every quantizer: the control of every row."""
        return self.subject(self.model)

    @cached_property
    def never(self) -> TransformerBridge:
        """The model that never learnt the forget facts."""
        return load(self.plan.never, device=self.plan.device)

    @cached_property
    def measurements(self) -> Measurements:
        """What is measured of a model on this bench."""
        return Measurements(self.plan, self.original, lambda: self.never)

    def subject(self, model: TransformerBridge) -> Subject:
        """A model to be measured on this bench."""
        return Subject(model, self.task, self.circuit, steps=self.plan.steps)

    def edit(self, cell: Cell) -> Edit:
        """What the cell's method changes, at the best learning rate where one is searched for."""
        method, settings = self.plan.settings_for(cell.method)
        flags = method_flags(method)
        if (found := self.search(cell.method)) is not None:
            settings = {"learning_rate": found.best.rate, **settings}
        key = {
            "method": method,
            "settings": settings_of(method, settings).digest(),
            "model": self.marks["model"],
            "task": self.marks["task"],
            "circuit": self.marks["circuit"] if flags.takes_circuit else "",
            "seed": cell.seed,
        }
        return self.store.result(
            f"edits/{cell.place}/edit",
            Edit,
            key,
            lambda: unlearn(
                self.model,
                self.task,
                method,
                circuit=self.circuit,
                seed=cell.seed,
                progress=self.progress,
                checkpoint=self.store.folder / f"edits/{cell.place}/checkpoint.safetensors",
                **settings,
            ),
        )

    def search(self, method: str) -> Search | None:
        """The learning rates that a method is tried at on the validation questions; None where the plan names none."""
        name, settings = self.plan.settings_for(method)
        if not (method_flags(name).searched and self.plan.rates):
            return None
        rates, validation = self.plan.rates, self.validation
        key = {
            "model": self.marks["model"],
            "validation": validation.digest(),
            "circuit": self.marks["circuit"] if method_flags(name).takes_circuit else "",
            "rates": rates,
            "settings": settings_of(name, settings).digest(),
        }
        return self.store.result(
            f"edits/{method.replace('/', '.')}/search",
            Search,
            key,
            lambda: search(self.model, validation, name, rates=rates, circuit=self.circuit, **settings),
        )

    def table(self, cell: Cell, edited: Callable[[], Subject] | None = None, **mark: Any) -> pd.DataFrame:
        """The tidy rows of a cell: base, method, seed, quantizer, question_set, measure, value, low, high, control.

        Args:
            edited: makes the edited model where it is needed; None for a cell without an edit.
            mark: what the rows depend on beside model, task and circuit.
        """
        plan, names, further = self.plan, self.plan.quantizers_of(cell.method), self.plan.looks_further(cell)
        key: dict[str, Any] = {
            **self.marks,
            **mark,
            "steps": plan.steps,
            "seed": cell.seed,
            "quantizers": names,
            "structure": CAD,
        }
        if cell.method == NEVER or (plan.attack_rates and plan.never):
            key["never"] = fingerprint(self.never)
        key["attack"] = [plan.attack_rates, plan.attack_steps, plan.attack_splits, plan.attack_seed, further]

        def make() -> pd.DataFrame:
            if edited is not None:
                return self.measurements.of_edit(edited(), self.edit(cell), names, cell.seed, further=further)
            return self.measurements.of_original(names) if cell.method == ORIGINAL else self.measurements.of_never()

        frame = self.store.table(f"scores/{cell.place}/measures", key, make)
        return frame.assign(base=self.name, method=cell.method, seed=cell.seed)[
            ["base", "method", "seed", *frame.columns]
        ]
