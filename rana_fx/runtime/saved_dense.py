"""A warning where ``save_pretrained`` of transformers saves a model with a plan attached: its files load as the dense model.

In: the call of a state_dict. Out: one ``RanaWarning`` per process where transformers' ``save_pretrained`` is the caller.
Checkpoints of training and ``torch.save`` are not concerned: what loads them is code of the user, who attaches the plan first.
"""

from __future__ import annotations

import sys

from torch import nn

from rana_fx.graph.callers import variable_of_caller
from rana_fx.notices import warn_once

_CAUSE = "save_pretrained of an adapted model"


def warn_of_save_pretrained() -> None:
    """Call while a model's state is collected; does nothing unless ``save_pretrained`` of a transformers model collects it."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    saved = variable_of_caller("save_pretrained", "self", nn.Module)
    if isinstance(saved, transformers.PreTrainedModel):
        name = type(saved).__name__
        warn_once(
            _CAUSE,
            f"{name}.save_pretrained: got a model with a plan attached; {name}.from_pretrained will load it as the dense model, "
            "without the plan. Save the plan as well, plan.save(folder), and after loading the model call "
            "rana_fx.attach(model, folder). rana_fx.detach(model) returns the plan, and leaves a model without factors.",
        )
