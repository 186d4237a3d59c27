"""`mtl.explore`: from a study, or a model and its edits, to the explorer's page in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, EdgeScores
from mansu_tl.data import Task
from mansu_tl.errors import MansuError
from mansu_tl.explorer.explorer import Explorer
from mansu_tl.explorer.view import ExplorerView
from mansu_tl.models.kinds import require_bridge
from mansu_tl.study import Study
from mansu_tl.unlearning import Edit
from mansu_tl.verification import CadByDepth


def explore(
    study_or_model: Study | TransformerBridge,
    task: Task | None = None,
    edits: Mapping[str, Edit] | Edit | None = None,
    *,
    quantizers: Sequence[str] = ("nf4",),
    scores: EdgeScores | None = None,
    circuit: Circuit | None = None,
    steps: int = 5,
    depth: Sequence[CadByDepth] = (),
) -> ExplorerView:
    """Explore in Jupyter what an edit did to a circuit: the last line of a cell shows it.

    Click an edge or a node to see its score before, after and after quantization, its weights on the quantizer's ruler,
    and its attention pattern beside the graph; ask a prompt of yours, switch parts off, pin and group them.
    `.save_html(path)` keeps it as a page, and `.explorer` is the same in Python.

    Args:
        study_or_model: a finished study, which brings edits, quantizers, scores and circuit; or a model.
        task: whose forget pairs are used; a study loads its own where it is not given.
        edits: one edit of the model, or several by name.
        quantizers: what the edited models are quantized with.
        scores: edge scores to select circuits by; EAP-IG's where not given.
        circuit: the first one shown.
        steps: of EAP-IG.
        depth: CAD by depth of edited models (`mansu_tl.verification.DepthReader`), shown with its verdict.

    Raises:
        MansuError: a model without task or edits, arguments beside a study that it brings itself, or anything that
            `Explorer` refuses.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> edit = mtl.unlearn(model, task, "graddiff")
        >>> mtl.explore(model, task, edit)
    """
    if isinstance(study_or_model, Study):
        if edits is not None or scores is not None or circuit is not None:
            raise MansuError("explore: a study brings its own edits, scores and circuit; leave them out")
        return ExplorerView(Explorer.of_study(study_or_model, task, depth=depth))
    require_bridge(study_or_model)
    if task is None or edits is None:
        raise MansuError("explore: a model needs a task and edits; pass explore(model, task, unlearn(model, task))")
    return ExplorerView(
        Explorer(
            study_or_model,
            task,
            edits,
            quantizers=quantizers,
            scores=scores,
            circuit=circuit,
            steps=steps,
            depth=depth,
        )
    )
