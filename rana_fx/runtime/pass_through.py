"""What the factors of a plan do where a model calls all of its parts in turn: ``attach`` adds one part, ``rana_fx``.

In: what a part is called with, and whether the model is a ``nn.Sequential``. Out: the same. A model with a loop of its own over
``self.children()`` may do anything with the results (add them, for a residual): there the call is an error.
"""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from rana_fx.errors import FactorsCalled
from rana_fx.runtime.saved_dense import warn_of_save_pretrained


class LastPart(nn.Module):
    """A module that yields its input as the last part of a ``nn.Sequential``."""

    in_sequential = False
    model = ""  # the class that it is a part of

    def as_part_of(self, model: nn.Module) -> Self:
        """Itself, knowing what it is added to, and whether that is a ``nn.Sequential``."""
        self.model = type(model).__name__
        self.in_sequential = type(model).forward is nn.Sequential.forward
        return self

    def forward(self, *inputs: Any) -> Any:
        """The only input. Raises FactorsCalled outside of a ``nn.Sequential``."""
        if not self.in_sequential or len(inputs) != 1:
            raise FactorsCalled(model=self.model)
        return inputs[0]

    def _save_to_state_dict(self, *args: Any) -> None:
        warn_of_save_pretrained()
        super()._save_to_state_dict(*args)
