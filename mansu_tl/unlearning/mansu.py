"""MANSU: unlearning restricted to the forget circuit, kept off the retain set, and large enough to survive 4 bits.

After *Forgetting That Sticks* (arXiv 2605.15138): the circuit says which weights may move, the retain set's inputs and
diagonal Fisher information say which moves are cheap, the floor makes every move cross into another code of the
quantizer. The paper's formulas are not public in full; what is stated here is our definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, discover_circuit
from mansu_tl.circuit.evaluation import require_graph
from mansu_tl.data import Sequences, Task
from mansu_tl.errors import MansuError, NoEditError
from mansu_tl.models import float32_copy, home, linear_weights, parameters
from mansu_tl.quantization import grid_of
from mansu_tl.unlearning.adversary import Attacked, attacked
from mansu_tl.unlearning.batches import (
    Ignorance,
    OriginalText,
    Sampler,
    ignorance,
    joined,
    last_token_logits,
    last_token_states,
    sequence_logits,
)
from mansu_tl.unlearning.candidates import circuit_weights, every_weight, random_weights
from mansu_tl.unlearning.checkpoint import Checkpoint, State, optimizer_tensors, restore_optimizer
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.floor import Floor
from mansu_tl.unlearning.mansu_needs import attackers_facts, budget_of, require_defended
from mansu_tl.unlearning.mansu_settings import MansuSettings
from mansu_tl.unlearning.neighbours import near_neighbours
from mansu_tl.unlearning.objective import forget_loss, representation_loss, retain_loss
from mansu_tl.unlearning.retain_statistics import (
    diagonal_fisher,
    input_moments,
    null_projector,
    require_null_space,
    retain_bound,
    sequence_loss,
)
from mansu_tl.unlearning.support import choose_support

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
) -> Edit:
    """Unlearn the task's forget set by moving circuit weights across code boundaries.

    Args:
        circuit: the forget circuit; discovered at faithfulness .85 where not given.
        checkpoint: where the state is kept on the way, and taken up.

    Raises:
        MansuError: a budget that leaves nothing to edit, a circuit of another architecture or with no editable weight,
            or a retain text too small for its null space.
    """
    if circuit is None:
        circuit = discover_circuit(model, task.forget_pairs, progress=progress)
    require_graph(model, circuit)
    run = _Run(model, task, settings, circuit, seed, progress)
    latent, allowed, history = run.optimise(checkpoint or Checkpoint())
    return run.edit(latent, allowed, history)


class _Run:
    """One optimisation: what is fixed before the first step."""

    def __init__(
        self, model: TransformerBridge, task: Task, settings: MansuSettings, circuit: Circuit, seed: int, progress: bool
    ) -> None:
        self.model, self.settings, self.circuit, self.seed, self.progress = model, settings, circuit, seed, progress
        self.hf = float32_copy(model)
        self.task = task.to(home(self.hf))
        self.values = {name: value.detach() for name, value in self.hf.named_parameters()}
        self.linear, self.stored = linear_weights(model), parameters(model)
        masks = self._candidates()
        # Cells and codes are those of the weights as stored; the loop itself runs in float32.
        self.floor = Floor(
            [grid_of(name) for name in settings.quantizers],
            {name: self._oriented(name, self.stored[name].detach()).contiguous() for name in self.linear},
            {name: self._oriented(name, mask) for name, mask in masks.items()},
        )
        self.rounded: dict[tuple[str, int], Tensor] = {}
        self.budget = budget_of(self.linear, settings)
        self.unknown: Ignorance = ignorance(self.hf, self.task)
        if settings.representation_weight and not bool((self.unknown.spread > 0).all()):
            raise MansuError(
                f"unseen: {len(self.task.unseen)} never-seen prompts have no spread to measure distances in; give two, "
                "or representation_weight=0"
            )
        self.facts = require_defended(self.task, settings)
        self.near, self.discovered = self._neighbours()
        self.kept_text = joined(self.task.retain_text, self.task.near_text)
        drawn = settings.steps * settings.retain_batch * (1 + bool(len(self.near)))
        text = joined(self.task.retain_text, self.near)
        self.original_text = OriginalText(self.hf, self.values, text, drawn)
        self.moments = self._moments(masks) if settings.null_space or settings.projector else {}
        self.projectors = (
            {name: null_projector(moment, settings.leak, name) for name, moment in self.moments.items()}
            if settings.projector
            else {}
        )
        self.importance = self._fisher(masks) if settings.fisher else None

    def _candidates(self) -> dict[str, Tensor]:
        cfg = self.settings
        if cfg.restrict == "circuit":
            return circuit_weights(self.model, self.circuit, self.task.forget_pairs, cfg.neuron_share)
        if cfg.restrict == "random":
            return random_weights(self.model, self.circuit, cfg.neuron_share, self.seed)
        return every_weight(self.model)

    def _neighbours(self) -> tuple[Sequences, list[int]]:
        """The near text: the task's, or what the model finds near in the retain text."""
        if len(self.task.near_text) or not self.settings.discover_near:
            return self.task.near_text, []
        rows = near_neighbours(self.hf, self.task.forget_pairs, self.task.retain_text, self.settings.discover_near)
        return self.task.retain_text[rows], rows.tolist()

    def optimise(
        self, checkpoint: Checkpoint
    ) -> tuple[Float[Tensor, " weight"], Bool[Tensor, " weight"], list[dict[str, float]]]:
        """The latent updates and the weights that may change."""
        cfg, floor = self.settings, self.floor
        generator = torch.Generator().manual_seed(self.seed)
        draw_forget = Sampler(len(self.task.forget_pairs), cfg.forget_batch, generator)
        draw_far = Sampler(len(self.task.retain_text), cfg.retain_batch, generator)
        near = self.near
        draw_near = Sampler(len(near), cfg.retain_batch, generator) if len(near) else None
        latent = torch.zeros_like(floor.value, requires_grad=True)
        allowed = torch.ones_like(floor.value, dtype=torch.bool)
        optimizer = torch.optim.Adam([latent], lr=cfg.learning_rate, betas=(0.9, 0.99))
        history: list[dict[str, float]] = []
        attack: Attacked | None = None
        freeze, frozen = int(cfg.freeze_at * cfg.steps), False
        warm_up = min(_WARM_UP, max(1, cfg.steps // 6))
        samplers = [draw for draw in (draw_forget, draw_far, draw_near) if draw]

        def state(done: int) -> State:
            tensors = {"latent": latent, "allowed": allowed, "generator": generator.get_state()}
            tensors |= {f"order:{i}": sampler.order for i, sampler in enumerate(samplers)}
            facts = {"done": done, "frozen": frozen, "history": history}
            return tensors | optimizer_tensors(optimizer), facts

        first = 0
        if (kept_state := checkpoint.read()) is not None:
            tensors, facts = kept_state
            with torch.no_grad():
                latent.copy_(tensors["latent"])
            allowed = tensors["allowed"].to(allowed.device)
            generator.set_state(tensors["generator"])
            for i, sampler in enumerate(samplers):
                sampler.order = tensors[f"order:{i}"]
            restore_optimizer(optimizer, tensors)
            first, frozen, history = int(facts["done"]), bool(facts["frozen"]), list(facts["history"])
        bar = tqdm(
            range(first, cfg.steps), desc="mansu", unit="step", initial=first, total=cfg.steps,
            disable=not self.progress,
        )  # fmt: skip
        for step in bar:
            left = (cfg.steps - step) / max(1, cfg.steps - freeze)
            optimizer.param_groups[0]["lr"] = cfg.learning_rate * min(1.0, (step + 1) / warm_up, max(left, 0.02))
            due = step >= cfg.select_from * cfg.steps and step % cfg.select_every == 0
            if not frozen and (step == freeze or due):
                kept = self._support(latent.detach(), allowed)
                # Where no weight has crossed yet, nothing can be chosen: in short runs the choice waits.
                if kept.any():
                    with torch.no_grad():
                        latent.mul_(kept)
                    if step >= freeze:
                        allowed, frozen = kept, True
            # Odd steps see the model as stored, even ones as deployed, grid by grid: all must have forgotten.
            under = step // 2 % len(floor.grids) if step % 2 == 0 and cfg.floor == "loop" else None
            change, changed = self._change(latent, allowed, under)
            values = self._values(change, under)
            rows = draw_forget()
            forget = self._forget(values, rows)
            retain = self._retain(values, draw_far(), draw_near() if draw_near else None)
            loss = forget + cfg.retain_weight * retain
            if cfg.adversary_weight:
                if attack is None or step % cfg.adversary_every == 0:
                    attack = self._attack(values, generator)
                loss = loss + cfg.adversary_weight * self._under_attack(values, attack, generator)
            if cfg.null_space:
                # On what the deployed model feels, whichever view this step takes.
                felt = self._change(latent, allowed, 0)[0] if cfg.floor == "loop" and under is None else change
                loss = loss + cfg.null_space * self._leak(felt)
            if not torch.isfinite(loss):
                raise NoEditError(
                    f"mansu: the loss is {loss.item()} at step {step}; lower learning_rate={cfg.learning_rate}, or check "
                    "the model's weights"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if self.projectors:
                self._project(latent, allowed)
            if step % 10 == 0 or step == cfg.steps - 1:
                row = {
                    "step": float(step),
                    "forget": forget.item(),
                    "retain": retain.item(),
                    "edited": float(changed.sum()),
                }
                history.append(row)
                bar.set_postfix(forget=f"{forget.item():.2f}", retain=f"{retain.item():.3f}", edited=int(row["edited"]))
            # Where the next step makes a new attack, so that none has to be kept.
            if not cfg.adversary_weight or (step + 1) % cfg.adversary_every == 0:
                checkpoint.offer(lambda done=step + 1: state(done))  # type: ignore[misc]
        final = latent.detach()
        return final, self._support(final, allowed), history

    def edit(self, latent: Tensor, allowed: Tensor, history: list[dict[str, float]]) -> Edit:
        """The change in storage dtype, with the retain bound beside what was measured."""
        cfg, floor = self.settings, self.floor
        if cfg.floor == "after":
            latent = floor.pushed(latent * allowed)
        finish = floor.unfloored if cfg.floor == "none" else floor.final
        matrices = {name: finish(name, latent, allowed) for name in floor.spans}
        edited = sum(int((matrix != floor.matrices[name]).sum()) for name, matrix in matrices.items())
        if not edited:
            raise NoEditError(
                f"mansu: no weight left its bin in {cfg.steps} steps, or every one that did costs more than the budgets "
                f"allow; raise steps, learning_rate (now {cfg.learning_rate} bins) or fisher_budget (now "
                f"{cfg.fisher_budget})"
            )
        facts = {
            "seed": self.seed,
            "settings": asdict(cfg),
            "circuit_edges": self.circuit.n_edges,
            "candidates": floor.size,
            "edited": edited,
            "near_rows": self.discovered,
            **self._retain_increase(matrices),
        }
        values = {name: self._oriented(name, matrix) for name, matrix in matrices.items()}
        return Edit.between(self.model, values, "mansu", facts, tuple(history))

    def _retain_increase(self, matrices: Mapping[str, Tensor]) -> dict[str, float]:
        """The retain loss's increase under the realised change: measured, its diagonal estimate and its bound."""
        text, under = self._sample(), None if self.settings.floor == "none" else 0
        change = self.floor.felt(matrices, under)
        with torch.no_grad():
            before = sequence_loss(self.hf, self._values(torch.zeros_like(change), under), text).item()
            after = sequence_loss(self.hf, self._values(change, under), text).item()
        facts = {"retain_loss_before": before, "retain_loss_after": after, "retain_increase_measured": after - before}
        if self.importance is not None:
            diagonal, bound = retain_bound(self.importance, change)
            facts |= {"retain_increase_fisher": diagonal.item(), "retain_increase_bound": bound.item()}
        return facts

    def _change(self, latent: Tensor, allowed: Tensor, under: int | None) -> tuple[Tensor, Tensor]:
        """The change of the weights as stored (None) or under one grid, and which weights move."""
        if self.settings.floor != "loop":
            return self.floor.plain(latent, allowed)
        stored, rounded, changed = self.floor.realise(latent, allowed, under or 0)
        return (stored if under is None else rounded), changed

    def _support(self, latent: Tensor, allowed: Tensor) -> Bool[Tensor, " weight"]:
        cfg = self.settings
        change, changed = self._change(latent, allowed, 0)
        if cfg.floor == "after":
            # Every weight that moved at all will be pushed across.
            pushed = self.floor.pushed(latent * allowed)
            _, change, changed = self.floor.realise(pushed, allowed)
        return choose_support(
            latent, change, changed, self.importance, budget=self.budget, fisher_budget=cfg.fisher_budget
        )

    @torch.no_grad()
    def _project(self, latent: Tensor, allowed: Tensor) -> None:
        """Take the part of the update out that retain inputs would feel; the support keeps what is left."""
        change = latent * self.floor.width * allowed
        for name, span in self.floor.spans.items():
            free = self.floor.spread(change, name) @ self.projectors[name]
            latent[span] = free.flatten()[self.floor.where[name]] / self.floor.width[span]

    def _values(self, change: Tensor, under: int | None) -> Mapping[str, Tensor]:
        """All parameters: as stored (None), or with every linear weight dequantized under one grid."""
        out = dict(self.values)
        for name in self.linear if under is not None else self.floor.spans:
            base = self._oriented(name, self.values[name]) if under is None else self._deployed(name, under)
            full = base + self.floor.spread(change, name) if name in self.floor.spans else base
            out[name] = self._oriented(name, full)
        return out

    def _deployed(self, name: str, under: int) -> Tensor:
        if (name, under) not in self.rounded:
            self.rounded[name, under] = self.floor.grids[under].roundtrip(self.floor.matrices[name].float())
        return self.rounded[name, under]

    def _forget(self, values: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        cfg, pairs, unknown = self.settings, self.task.forget_pairs[rows], self.unknown.of(rows)
        if cfg.representation_weight:
            logits, states = last_token_states(self.hf, values, pairs.clean, pairs.lengths)
            away = representation_loss(states, unknown.state, unknown.spread)
        else:
            logits = last_token_logits(self.hf, values, pairs.clean, pairs.lengths)
            away = logits.new_zeros(())
        return cfg.representation_weight * away + forget_loss(
            logits,
            unknown.reference,
            unknown.pool,
            pairs.answers,
            divergence_weight=cfg.divergence_weight,
            margin=cfg.margin,
            margin_weight=cfg.margin_weight,
            band=cfg.band,
            band_weight=cfg.band_weight,
        )

    def _attack(self, values: Mapping[str, Tensor], generator: torch.Generator) -> Attacked:
        cfg = self.settings
        return attacked(
            self.hf,
            values,
            tuple(self.linear),
            self.task.forget_pairs,
            self.facts,
            count=attackers_facts(self.facts, cfg),
            steps=cfg.adversary_steps,
            learning_rate=cfg.adversary_rate,
            batch=cfg.retain_batch,
            generator=generator,
        )

    def _under_attack(self, values: Mapping[str, Tensor], attack: Attacked, generator: torch.Generator) -> Tensor:
        """The forget loss on facts that the attacker does not have, at the weights he would reach (first order)."""
        there = {
            name: value + attack.change[name] if name in attack.change else value for name, value in values.items()
        }
        rows = attack.others[torch.randperm(len(attack.others), generator=generator)[: self.settings.forget_batch]]
        return self._forget(there, rows)

    def _retain(
        self, values: Mapping[str, Tensor], far: Int[Tensor, " far"], near: Int[Tensor, " near"] | None
    ) -> Tensor:
        """Mean over far tokens plus `near_weight` times the mean over near ones, as one weighted pass.

        Args:
            far: rows of the retain text.
            near: rows of the near text.
        """
        rows = far if near is None else torch.cat([far, near + len(self.task.retain_text)])
        found = sequence_logits(self.hf, values, self.original_text.text[rows])
        is_near = found.rows >= len(far)
        weights = torch.where(is_near, self.settings.near_weight / is_near.sum().clamp_min(1), 1 / (~is_near).sum())
        original = self.original_text(rows, found)
        return retain_loss(found.logits, original, found.targets, weights, likelihood=self.settings.likelihood)

    def _leak(self, change: Tensor) -> Tensor:
        """Mean squared change of the circuit matrices' outputs on retain inputs, relative to the inputs' size."""
        total = change.new_zeros(())
        for name in self.floor.spans:
            moved, moment = self.floor.spread(change, name), self.moments[name]
            leak = ((moved @ moment) * moved).sum()
            total = total + leak * moment.shape[0] / (moved.shape[0] * moment.trace())
        return total

    def _moments(self, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Second moments of the matrices' inputs, near text weighted as in the retain loss."""
        far = input_moments(self.hf, names, self.task.retain_text)
        require_null_space(self.task.retain_text, far)
        if not len(self.near):
            return far
        near, weight = input_moments(self.hf, names, self.near), self.settings.near_weight
        return {name: (far[name] + weight * near[name]) / (1 + weight) for name in far}

    def _fisher(self, names: Mapping[str, Tensor]) -> Float[Tensor, " weight"]:
        full = diagonal_fisher(self.hf, names, self._sample(), progress=self.progress)
        out = torch.empty_like(self.floor.value)
        for name, span in self.floor.spans.items():
            out[span] = self._oriented(name, full[name]).flatten()[self.floor.where[name]]
        return out

    def _sample(self) -> Sequences:
        """Retain and near sequences, evenly spread: what the Fisher information and the retain bound are taken on."""
        count = min(self.settings.fisher_sequences, len(self.kept_text))
        return self.kept_text[[i * len(self.kept_text) // count for i in range(count)]]

    def _oriented(self, name: str, value: Tensor) -> Tensor:
        """A matrix as stored turned to [out, in], or back."""
        return value.T if self.linear[name].transposed else value
