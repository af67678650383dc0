r"""Why entries of a state dict are plainly averaged by a pass."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..aliases import sharing
from ..merge import buffers_of
from .layers import why_no_view
from .recipes import Making
from .survey import Survey


def reasons_to_average(model: nn.Module, known: Survey, making: Making) -> dict[str, str]:
    """A reason for every entry of the model's state dict, for use where the merge did not solve
    it."""
    modules, reasons = dict(model.named_modules(remove_duplicate=False)), {}
    for name in model.state_dict():
        reasons[name] = why_no_view(modules.get(name.rpartition(".")[0], model))
    for names in sharing(model):
        for name in names:
            reasons[name] = f"tied to {', '.join(other for other in names if other != name)}"
    reasons |= dict.fromkeys(buffers_of(model), "a buffer")
    for path, layer in known.paths.items():
        for parameter in replace(known.views[layer], name=path).parameters:
            reasons[parameter] = _of_layer(layer, parameter, known, making)
    return reasons


def _of_layer(layer: str, parameter: str, known: Survey, making: Making) -> str:
    """The reason for a parameter of a layer that can be viewed."""
    recipe = making.recipe
    reason = making.left_out.get(layer) or known.left_out.get(layer)
    if reason is not None:
        return reason
    if recipe.layers is not None and layer not in recipe.layers:
        return "not among the layers asked for"
    if layer not in making.views or making.solved & set(known.views[layer].parameters):
        return f"outside the scope {recipe.scope!r}"
    return "no calibration batch calls it"
