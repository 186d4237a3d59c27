"""`mtl.explore`: from a study, or a model and its edits, to widgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, EdgeScores
from mansu_tl.data import Task
from mansu_tl.errors import MansuError
from mansu_tl.explorer.explorer import Explorer
from mansu_tl.models.kinds import require_bridge
from mansu_tl.study import Study
from mansu_tl.unlearning import Edit

if TYPE_CHECKING:
    from mansu_tl.explorer.widgets import ExplorerWidget

_NEEDED = ("ipywidgets", "anywidget")


def explore(
    study_or_model: Study | TransformerBridge,
    task: Task | None = None,
    edits: Mapping[str, Edit] | Edit | None = None,
    *,
    quantizers: Sequence[str] = ("nf4",),
    scores: EdgeScores | None = None,
    circuit: Circuit | None = None,
    steps: int = 5,
) -> ExplorerWidget:
    """Explore in Jupyter what an edit did to a circuit: the last line of a cell shows it.

    Click an edge or a node to see its score before, after and after quantization, its weights on the quantizer's ruler,
    and its attention pattern; move the size and watch faithfulness. `.save_html(path)` keeps it as a page, and
    `.explorer` is the same without widgets.

    Args:
        study_or_model: a finished study, which brings edits, quantizers, scores and circuit; or a model.
        task: whose forget pairs are used; a study loads its own where it is not given.
        edits: one edit of the model, or several by name.
        quantizers: what the edited models are quantized with.
        scores: edge scores to select circuits by; EAP-IG's where not given.
        circuit: the first one shown.
        steps: of EAP-IG.

    Raises:
        MansuError: ipywidgets or anywidget is missing, a model without task or edits, arguments beside a study that
            it brings itself, or anything that `Explorer` refuses.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> edit = mtl.unlearn(model, task, "graddiff")
        >>> mtl.explore(model, task, edit)
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MansuError(
            f"explore: {' and '.join(missing)} not installed; pip install 'mansu-tl[explore]', or use "
            "mansu_tl.explorer.Explorer, which needs no widgets and has save_html()"
        )
    from mansu_tl.explorer.widgets import ExplorerWidget

    if isinstance(study_or_model, Study):
        if edits is not None or scores is not None or circuit is not None:
            raise MansuError("explore: a study brings its own edits, scores and circuit; leave them out")
        return ExplorerWidget(Explorer.of_study(study_or_model, task))
    require_bridge(study_or_model)
    if task is None or edits is None:
        raise MansuError("explore: a model needs a task and edits; pass explore(model, task, unlearn(model, task))")
    return ExplorerWidget(
        Explorer(study_or_model, task, edits, quantizers=quantizers, scores=scores, circuit=circuit, steps=steps)
    )
