"""Select the Parameters of an adapted model that are trained.

In: a model with a plan attached. Out: its Parameters with ``requires_grad`` set, and guards of compiled code invalidated: factors
are not arguments of the compiled function, so that no other guard depends on their ``requires_grad``.
"""

from __future__ import annotations

from torch import nn

from rana_fx.errors import InvalidOption, NoPlan, NothingToTrain, UnknownChoice
from rana_fx.formats import is_plain
from rana_fx.graph.operands import base_name
from rana_fx.modules import unwrap, weights_of
from rana_fx.runtime.attachment import MODULE, Attachment, attached, invalidate_guards
from rana_fx.runtime.replaced_weights import replaced_weights

WHAT = ("factors", "all")


def trainable(model: nn.Module, *, what: str = "factors") -> dict[str, nn.Parameter]:
    """Train these and freeze the rest; returns them by name, for an optimizer.

    Args:
        model: with a plan attached; compiled code of it is compiled again on the next call.
        what: "factors": the floating factors of the plan (router B, weight A, biases, shifts) and the model's own weights that
            its masks select from. "all": also all other Parameters that the model reads. Never trained: thresholds, quantised
            factors and weights that factors replace, which the adapted model does not read.

    Raises:
        NoPlan, NothingToTrain, UnknownChoice.
        InvalidOption: ``model`` is a wrapper around the model that the plan was attached to.
    """
    if what not in WHAT:
        raise UnknownChoice(kind="what", got=what, valid=", ".join(WHAT))
    model = unwrap(model)
    found = attachment_to_train(model)
    factors = {f"{MODULE}.{name}": factor for name, factor in found.factors.named_parameters()}
    weights = weights_to_train(model, found)
    replaced = {id(weights[name]) for name in replaced_weights(found.plan)}
    own = {id(weights[base_name(site)]) for adapter in found.plan.adapters if adapter.reads_model for site in adapter.sites}
    chosen = dict(factors)
    for name, parameter in model.named_parameters():
        live = is_plain(parameter) and id(parameter) not in replaced
        if live and (what == "all" or id(parameter) in own):
            chosen[name] = parameter
    if not chosen:
        reason = "the plan's factors are quantised, and it masks no weight of the model's"
        raise NothingToTrain(model=type(model).__name__, what=what, reason=reason, todo='pass what="all"')
    train_only(model, chosen)
    return chosen


def train_only(model: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
    """Set ``requires_grad`` of all floating Parameters: True for ``chosen``, False for the rest."""
    kept = set(map(id, chosen.values()))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(id(parameter) in kept)
    invalidate_guards(model)


def attachment_to_train(model: nn.Module) -> Attachment:
    """The attachment of the model. Raises NoPlan."""
    found = attached(model)
    if found is None:
        raise NoPlan(site=next((name for name, _ in model.named_parameters()), type(model).__name__))
    return found


def weights_to_train(model: nn.Module, found: Attachment) -> dict[str, nn.Parameter]:
    """The model's weights by the plan's names. Raises InvalidOption for a wrapper around the model that has the plan."""
    weights = weights_of(model)
    if any(base_name(record.name) not in weights for record in found.plan.sites):
        expected = "the model that the plan was attached to; of a peft model, what merge_and_unload() returns"
        raise InvalidOption(name="model", got=type(model).__name__, expected=expected)
    return weights
