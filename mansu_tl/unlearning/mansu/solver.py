"""MANSU: unlearning restricted to the forget circuit, kept off the retain set, and large enough to survive 4 bits.

After *Forgetting That Sticks* (arXiv 2605.15138): the circuit says which weights may move, the retain set's inputs and
diagonal Fisher information say which moves are cheap, the floor makes every move cross into another code of the
quantizer. The paper's formulas are not public in full; what is stated here is our definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, discover_circuit
from mansu_tl.circuit.evaluation import require_graph
from mansu_tl.data import Task
from mansu_tl.errors import MansuError, NoEditError
from mansu_tl.models import orient
from mansu_tl.models.tree import layer_of
from mansu_tl.runs import distributed
from mansu_tl.unlearning.batches import Batch
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.loop import Solver, run
from mansu_tl.unlearning.mansu.adversary import Attacked, attacked
from mansu_tl.unlearning.mansu.closed import closed_form
from mansu_tl.unlearning.mansu.floor import most_wanted
from mansu_tl.unlearning.mansu.memory import require_fit_of_mansu
from mansu_tl.unlearning.mansu.plan import Plan, plan
from mansu_tl.unlearning.mansu.settings import MansuSettings
from mansu_tl.unlearning.mansu.terms import objective
from mansu_tl.unlearning.retain_cost import retain_cost, within

# Steps over which the step size rises, in runs of sixty or more.
_WARM_UP = 10


def mansu(
    model: TransformerBridge,
    task: Task,
    settings: MansuSettings,
    *,
    circuit: Circuit | None = None,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
    data_parallel: bool = False,
) -> Edit:
    """Unlearn the task's forget set by moving circuit weights across code boundaries.

    Args:
        circuit: the forget circuit; discovered at faithfulness .85 where not given.
        data_parallel: share the prompts and the text out over the processes of `torch.distributed`; the closed form only.

    Raises:
        MansuError: a circuit of another architecture, too little memory, or what `plan` refuses.
        NoEditError: no weight left its bin, or the loss is not finite.
    """
    if data_parallel:
        distributed.require_group()
        if settings.solver != "closed":
            raise MansuError(
                'mansu: data_parallel=True with solver="gradient", whose steps are not shared; choose the method '
                '"mansu-closed", or leave it out'
            )
    if circuit is None:
        circuit = discover_circuit(model, task.forget_pairs, progress=progress)
    require_graph(model, circuit)
    require_fit_of_mansu(model, task, settings, circuit)
    fixed = plan(model, task, settings, circuit, seed, data_parallel=data_parallel, progress=progress)
    checkpoint = checkpoint or Checkpoint()
    if settings.solver == "closed":
        latent, history = closed_form(fixed, settings, seed, checkpoint, progress=progress)
        support = latent != 0
    else:
        solver = _Mansu(fixed, settings, seed)
        run(solver, checkpoint, progress=progress)
        latent, support, history = solver.latent.detach(), solver.support(), solver.history
    matrices = fixed.floor.stored(latent, support)
    edited = sum(int((matrix != fixed.floor.matrices[name]).sum()) for name, matrix in matrices.items())
    if not edited and settings.solver == "closed":
        raise NoEditError(
            f"mansu: no move in layers {', '.join(map(str, fixed.layers))} gains enough; lower null_space (now "
            f"{settings.null_space}) or least_gain (now {settings.least_gain}), or raise until (now {settings.until})"
        )
    if not edited:
        raise NoEditError(
            f"mansu: no weight left its bin in {settings.steps} steps, or every one that did costs more than the budgets "
            f"allow; raise steps, learning_rate (now {settings.learning_rate} bins) or retain_budget (now "
            f"{settings.retain_budget})"
        )
    facts = {
        "seed": seed,
        "settings": asdict(settings),
        "circuit_edges": circuit.n_edges,
        "prompts": len(fixed.source.pairs),
        "candidates": fixed.floor.size,
        "edited": edited,
        "near_rows": fixed.near_rows,
        **({"layers": list(fixed.layers)} if fixed.layers else {}),
        **_retain_increase(fixed, matrices),
    }
    values = {name: orient(matrix, fixed.view.linear[name]) for name, matrix in matrices.items()}
    return Edit.between(model, values, "mansu", facts, tuple(history))


class _Mansu(Solver):
    """The latent updates of the candidates, in bins, and which of them may still move."""

    method = "mansu"

    def __init__(self, fixed: Plan, settings: MansuSettings, seed: int) -> None:
        self.fixed, self.settings, self.seed = fixed, settings, seed
        self.steps, self.learning_rate = settings.steps, settings.learning_rate
        self.freeze = int(settings.freeze_at * settings.steps)
        self.warm_up = min(_WARM_UP, max(1, settings.steps // 6))
        self.objective = objective(settings, fixed.unknown)
        edited = {layer for name in fixed.floor.spans if (layer := layer_of(fixed.hf, name)) is not None}
        self.places = tuple(sorted(edited))[:-1]  # behind the last nothing is edited

    def restart(self) -> None:
        cfg, latent = self.settings, torch.zeros_like(self.fixed.floor.value, requires_grad=True)
        self.start(self.seed, {"latent": latent}, torch.optim.Adam([latent], lr=cfg.learning_rate, betas=(0.9, 0.99)))
        self.held = {"allowed": torch.ones_like(latent, dtype=torch.bool)}
        self.marks = {"frozen": False}
        self.samplers = self.fixed.source.samplers(cfg.forget_batch, cfg.retain_batch, cfg.retain_batch, self.generator)
        self.attack: Attacked | None = None

    @property
    def latent(self) -> Float[Tensor, " weight"]:
        """The updates."""
        return self.trained["latent"]

    @property
    def allowed(self) -> Bool[Tensor, " weight"]:
        """The weights that may move."""
        return self.held["allowed"]

    def rate(self, step: int) -> float:
        left = (self.steps - step) / max(1, self.steps - self.freeze)
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up, max(left, 0.02))

    def loss(self, step: int) -> Float[Tensor, ""]:
        self._cut(step)
        cfg, floor = self.settings, self.fixed.floor
        # Odd steps see the model as stored, even ones as deployed, grid by grid: all must have forgotten.
        under = step // 2 % len(floor.grids) if step % 2 == 0 and cfg.floor == "loop" else None
        most = self._most(step)
        change, changed = floor.change(self.latent, self.allowed, under, most)
        batch = self.fixed.source.draw(self.samplers, self.fixed.view(change, under))
        forget, retain = self.objective.terms(batch)
        loss = forget + cfg.retain_weight * retain
        if cfg.place_weight and self.places:
            loss = loss + cfg.place_weight * self._at_place(batch, step)
        if cfg.adversary_weight:
            loss = loss + cfg.adversary_weight * self._under_attack(batch, step)
        if cfg.null_space:
            # On what the deployed model feels, whichever view this step takes.
            stored = cfg.floor == "loop" and under is None
            felt = floor.change(self.latent, self.allowed, 0, most)[0] if stored else change
            loss = loss + cfg.null_space * self._leak(felt)
        if step % 10 == 0 or step == self.steps - 1:
            row = {"step": step, "forget": forget.item(), "retain": retain.item(), "edited": changed.sum().item()}
            self.history.append({key: float(value) for key, value in row.items()})
        return loss

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Take the part of the update out that retain inputs would feel; the support keeps what is left."""
        floor, projectors = self.fixed.floor, self.fixed.projectors
        pieces = floor.pieces(self.latent * floor.width * self.allowed)
        for name, projector in projectors.items():
            span, free = floor.spans[name], floor.spread(pieces[name], name) @ projector
            self.latent[span] = free.flatten()[floor.where[name]].to(self.latent.device) / floor.width[span]

    def _most(self, step: int) -> int | None:
        """How many weights may have crossed at a step; None = as many as will."""
        rise = self.settings.gradual * self.steps
        return max(1, round(self.fixed.budget * min(1.0, (step + 1) / rise))) if rise else None

    def complete(self, done: int) -> bool:
        # Where the next step makes a new attack, so that none has to be kept.
        return not self.settings.adversary_weight or done % self.settings.adversary_every == 0

    def support(self) -> Bool[Tensor, " weight"]:
        """The weights that the budgets pay for."""
        latent = self.latent.detach()
        change, changed = self.fixed.floor.deployed(latent, self.allowed)
        order = most_wanted(latent, change, changed, self.fixed.importance, self.fixed.budget)
        kept = torch.zeros_like(changed)
        if budget := self.settings.retain_budget:

            def divergence(count: int) -> float:
                some = torch.zeros_like(change).index_copy(0, order[:count], change[order[:count]])
                return retain_cost(self.fixed.hf, self.fixed.between(some), self.fixed.sample).divergence

            order = order[: within(len(order), budget, divergence)] if len(order) else order
        kept[order] = True
        return kept

    @torch.no_grad()
    def _cut(self, step: int) -> None:
        """Set updates back that the budgets do not pay for, every few steps; from `freeze_at` on they stay at 0."""
        cfg = self.settings
        due = step >= cfg.select_from * cfg.steps and step % cfg.select_every == 0
        if self.marks["frozen"] or not (step == self.freeze or due):
            return
        kept = self.support()
        # Where no weight has crossed yet, nothing can be chosen: in short runs the choice waits.
        if kept.any():
            self.latent.mul_(kept)
            if step >= self.freeze:
                self.held["allowed"], self.marks["frozen"] = kept, True

    def _under_attack(self, batch: Batch, step: int) -> Float[Tensor, ""]:
        """The forget term on facts that the attacker does not have, at the weights he would reach (first order)."""
        cfg, fixed = self.settings, self.fixed
        if self.attack is None or step % cfg.adversary_every == 0:
            names = tuple(fixed.view.linear)
            spread = cfg.adversary_spread ** min(1.0, step / max(1, self.freeze))
            source = fixed.source
            self.attack = attacked(
                fixed.hf, batch.values, names, source.pairs, fixed.facts, cfg, self.generator, source.near, spread
            )
        moved, others = self.attack.change, self.attack.others
        there = {name: value + moved[name] if name in moved else value for name, value in batch.values.items()}
        rows = others[torch.randperm(len(others), generator=self.generator)[: cfg.forget_batch]]
        return self.objective.forget(replace(batch, values=there, rows=rows))

    def _at_place(self, batch: Batch, step: int) -> Float[Tensor, ""]:
        """The objective where the layers behind one are the original's again, so what is mended behind it does not count."""
        # Views take turns by single steps and pairs of them: a place lasts as long as they need.
        place = self.places[step // (2 * len(self.fixed.floor.grids)) % len(self.places)]
        hf, original = self.fixed.hf, self.fixed.source.original
        kept = {name for name in batch.values if (layer := layer_of(hf, name)) is not None and layer <= place}
        values = {name: value if name in kept else original[name] for name, value in batch.values.items()}
        return self.objective(replace(batch, values=values))

    def _leak(self, change: Float[Tensor, " weight"]) -> Float[Tensor, ""]:
        """Mean squared change of the circuit matrices' outputs on retain inputs, relative to the inputs' size."""
        total = change.new_zeros(())
        pieces = self.fixed.floor.pieces(change)
        for name, moment in self.fixed.moments.items():
            moved = self.fixed.floor.spread(pieces[name], name)
            leak = ((moved @ moment) * moved).sum()
            total = total + (leak * moment.shape[0] / (moved.shape[0] * moment.trace())).to(total.device)
        return total


def _retain_increase(fixed: Plan, matrices: Mapping[str, Tensor]) -> dict[str, float | None]:
    """What the realised change costs on the retain sample, in nats a token: see `RetainCost`."""
    change = fixed.floor.felt(matrices, fixed.deployed_view)
    cost = retain_cost(fixed.hf, fixed.between(change), fixed.sample, predict=True)
    return {
        "retain_loss_before": cost.before,
        "retain_loss_after": cost.after,
        "retain_increase_measured": cost.after - cost.before,
        "retain_divergence_measured": cost.divergence,
        "retain_divergence_fisher": cost.predicted,
    }
