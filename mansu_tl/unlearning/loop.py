"""The loop that every method runs in: draw, loss, Adam's step, and what the method makes of it.

Around the steps: a learning rate by step, checks that end the loop or send it back, a checkpoint that an interrupted
run goes on from to the last bit, a bar.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mansu_tl.errors import NoEditError
from mansu_tl.unlearning.batches import Sampler
from mansu_tl.unlearning.checkpoint import Checkpoint, State

Verdict = Literal["on", "done", "beyond"]


class Solver(ABC):
    """What moves in a loop and what a step does to it."""

    method: str  # for messages
    steps: int  # at most
    learning_rate: float  # at its peak
    check_every: int = 0  # steps between checks; 0 = none
    generator: torch.Generator  # of every random choice
    samplers: tuple[Sampler, ...]  # which draw from it
    optimizer: torch.optim.Optimizer
    trained: dict[str, Tensor]  # what the optimizer moves
    held: dict[str, Tensor]  # further tensors that change
    marks: dict[str, Any]  # plain values that change
    history: list[dict[str, float]]  # a row a logged step

    def start(self, seed: int, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Everything that moves, as before the first step."""
        self.generator = torch.Generator().manual_seed(seed)
        self.trained, self.optimizer = trained, optimizer
        self.held, self.marks, self.history = {}, {}, []

    @abstractmethod
    def restart(self) -> None:
        """Call `start`, and set what else moves."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """The learning rate of a step."""

    def check(self, step: int) -> Verdict:
        """Whether to go on before a step, to end, or that the end lies back between two checks."""
        return "on"

    @abstractmethod
    def loss(self, step: int) -> Float[Tensor, ""]:
        """The loss of a step."""

    def after(self, step: int) -> None:  # noqa: B027 - nothing, unless a method says so
        """What is done to the tensors once the optimizer has moved them."""

    def complete(self, done: int) -> bool:
        """Whether the attributes above are all that the next step needs, so that a checkpoint may be written."""
        return True


def run(solver: Solver, checkpoint: Checkpoint, *, progress: bool = False) -> None:
    """Run a solver to its end, from the checkpoint where there is one.

    Where a check finds the end passed ("beyond"), the run starts again and looks at every step from the check before.

    Raises:
        NoEditError: the loss is not finite.
    """
    fine_from = -1  # the check from which on every step is looked at; -1 = none
    while True:
        solver.restart()
        first, fine_from = _resumed(solver, checkpoint, fine_from)
        total, every = solver.steps, solver.check_every
        with tqdm(range(first, total), solver.method, total, initial=first, unit="step", disable=not progress) as bar:
            for step in bar:
                if every and (step % every == 0 or -1 < fine_from < step):
                    verdict = solver.check(step)
                    if verdict == "beyond" and fine_from < 0 and step and every > 1:
                        fine_from = step - every
                        break
                    if verdict != "on":
                        return
                _step(solver, step)
                if solver.history:
                    bar.set_postfix(solver.history[-1], refresh=False)
                if solver.complete(step + 1):
                    checkpoint.offer(lambda: _state(solver, step + 1, fine_from))  # noqa: B023 - called at once
            else:
                return


def _step(solver: Solver, step: int) -> None:
    for group in solver.optimizer.param_groups:
        group["lr"] = solver.rate(step)
    loss = solver.loss(step)
    if not torch.isfinite(loss):
        raise NoEditError(
            f"{solver.method}: the loss is {loss.item()} at step {step}; lower learning_rate={solver.learning_rate}, or "
            "check the model's weights"
        )
    solver.optimizer.zero_grad()
    loss.backward()
    solver.optimizer.step()
    solver.after(step)


def _state(solver: Solver, done: int, fine_from: int) -> State:
    """Everything that moves, after so many steps."""
    memory = solver.optimizer.state_dict()["state"]
    tensors = {
        "generator": solver.generator.get_state(),
        **{f"order:{i}": sampler.order for i, sampler in enumerate(solver.samplers)},
        **{f"trained:{name}": value for name, value in solver.trained.items()},
        **{f"held:{name}": value for name, value in solver.held.items()},
        **{f"optimizer:{i}:{name}": value for i, each in memory.items() for name, value in each.items()},
    }
    return tensors, {"done": done, "fine_from": fine_from, "marks": solver.marks, "history": solver.history}


def _resumed(solver: Solver, checkpoint: Checkpoint, fine_from: int) -> tuple[int, int]:
    """Put back what the checkpoint holds: the number of steps done, and the check from which on all are looked at."""
    state = checkpoint.read()
    # Sent back to look at every step, it starts again: what was kept lies beyond.
    if state is None or state[1]["fine_from"] < fine_from:
        return 0, fine_from
    tensors, facts = state
    with torch.no_grad():
        for name, value in solver.trained.items():
            value.copy_(tensors[f"trained:{name}"])
    solver.held = {name: tensors[f"held:{name}"].to(value.device) for name, value in solver.held.items()}
    for i, sampler in enumerate(solver.samplers):
        sampler.order = tensors[f"order:{i}"]
    solver.generator.set_state(tensors["generator"])
    solver.optimizer.load_state_dict({**solver.optimizer.state_dict(), "state": _memory(tensors)})
    solver.marks, solver.history = dict(facts["marks"]), list(facts["history"])
    return int(facts["done"]), int(facts["fine_from"])


def _memory(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """What the optimizer remembered, by parameter number and name."""
    memory: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer:"):
            _, number, name = key.split(":", 2)
            memory.setdefault(int(number), {})[name] = value
    return memory
