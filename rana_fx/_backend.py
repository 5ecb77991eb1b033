"""The backend: ``torch.compile(model, backend=rana_fx.backend)`` or ``backend="rana"``.

In: a Dynamo graph and its inputs. Out: Inductor's compiled function for the rewritten graph. The graph is guarded on
the identity of its weights and of the plan attached to them, and Inductor's cache key contains the plan's digest and the
hash of this package's sources, so that compiled code is never reused for another plan or another version of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from rana_fx import notices
from rana_fx.dense_memory import free_
from rana_fx.errors import InvalidOption, NoPlan, one_of
from rana_fx.graph.fake_values import mode_of
from rana_fx.graph.graph_pass import Outdated
from rana_fx.graph.guards import guard_weights
from rana_fx.graph.real_values import translator
from rana_fx.graph.recompiles import keep_compiling
from rana_fx.graph.unused_inputs import remove_unused_weights, taking
from rana_fx.kernels.registry import fingerprint
from rana_fx.passes.check_freed import weights_to_free
from rana_fx.passes.runner import Result, run, run_post_grad
from rana_fx.passes.sources import sources_hash
from rana_fx.plan import Plan
from rana_fx.runtime import compiled_methods
from rana_fx.runtime.attachment import attached, attachment_of
from rana_fx.runtime.changed_weights import TODO as OUTDATED
from rana_fx.runtime.changed_weights import adopt, gone
from rana_fx.runtime.disabled_parts import disabled_parts
from rana_fx.runtime.inductor_options import inductor_options, launches_wait, with_defaults
from rana_fx.runtime.plain_weights import attachments_of_models, in_place_of_planned
from rana_fx.runtime.plan_folder import kept_alive
from rana_fx.runtime.plan_option import gone as gone_by_option
from rana_fx.runtime.plan_option import plan_of
from rana_fx.runtime.prefill import MODES

_UNKNOWN = "the plan knows none of the weights in this graph: it runs dense"
_TODO = (
    "rana_fx.explain(model, batch) shows what becomes of every linear, and options={'strict': True} makes this an error. "
    "If the model is called otherwise than when it was adapted, adapt it as it is called."
)


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one graph by the plan attached to its weights. torch.compile calls this for every graph that Dynamo traces.

    Args:
        gm: a Dynamo graph whose weights are Parameters; it is rewritten in place.
        example_inputs: a value for each placeholder of ``gm``, in order, as Dynamo passes them: tensors, Parameters and symbolic
            sizes. Shapes, strides, dtypes and devices are taken from them.
        options: a mapping with any of these keys.

            - "plan": a ``Plan``, or the folder of a saved one, to use instead of the attached plan. The model is not changed.
            - "prefill": how a call with many tokens, such as a prompt, is computed. "masked" (default): as any other call.
              "dense": by the original linears, in calls with more tokens than masks are expected to save time for.
              "cheapest": by the original linears, in calls with more than 16 tokens, where the factors take more multiply-adds.
              These three keep dense weights and factors in memory. "factors": as "masked", and when the model first runs the
              weights that factors replace are freed, irreversibly: the model then runs only compiled and only by this plan, and
              the values of these weights in eager mode and in ``state_dict`` are NaN. "factors" needs an attached plan and
              ``torch.no_grad()``, and each graph that frees a weight is compiled twice.
            - "strict": True raises ``NotApplied`` where a part of the plan cannot be applied in a graph. By default that linear
              is dense, and a ``RanaWarning`` is given once for each cause.
            - "mode", and the options of Inductor, as torch.compile takes them for ``backend="inductor"``. Graphs that decode on
              a GPU have other defaults (``runtime/inductor_options.py``).
        mode: "default", "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs".

    Returns:
        Inductor's compiled function: it takes values of the placeholders, in order, and returns the outputs of the graph.

    Raises:
        NoPlan: the graph has linears, and no plan is attached to its model. (torch.compile wraps an error of a backend in
            BackendCompilerFailed, whose ``inner_exception`` is the error named here.)
        PlanMismatch: the plan given as an option is for other weights.
        LoraBeside: a LoRA module of peft was added in parallel to a linear that the plan replaces.
        WeightsFreed: the graph reads a weight that ``{"prefill": "factors"}`` freed.
        NotApplied: under ``{"strict": True}``.
        InvalidOption: an unknown option, or an invalid value of one.
        PlanFileError, PlanVersion: the folder given as "plan" cannot be read.
    """
    from torch._inductor.compile_fx import compile_fx

    from rana_fx.passes import lower

    lower.register()
    given = dict(options or {})
    plan = plan_of(options or {})
    given.pop("plan", None)
    prefill, strict = _own_options(given, plan)
    patches = inductor_options(given, mode)
    result = rewrite(gm, example_inputs, plan=plan, prefill=prefill, strict=strict)
    weights = weights_to_free(result.matches) if prefill == "factors" else []
    patches["post_grad_custom_pre_pass"] = _PostGrad(result, patches.get("post_grad_custom_pre_pass"))
    stay = remove_unused_weights(gm, example_inputs)
    read = [example_inputs[i] for i in stay]
    with launches_wait():
        compiled: Any = compile_fx(gm, read, config_patches=with_defaults(patches, gm))
    compiled = taking(compiled, stay, len(example_inputs))
    if plan is not None:
        compiled = kept_alive(compiled, plan)
    return _freeing_after_first_run(compiled, weights) if weights else compiled


def _own_options(given: dict[str, Any], plan: Plan | None) -> tuple[str, bool]:
    """The values of ("prefill", "strict"), removed from the options. Raises InvalidOption."""
    prefill = given.pop("prefill", "masked")
    if prefill not in MODES:
        raise InvalidOption(name="prefill", got=prefill, expected=one_of(prefill, MODES))
    if prefill == "factors" and (plan is not None or torch.is_grad_enabled()):
        expected = "a plan that is attached to the model" if plan is not None else "torch.no_grad() around the call"
        raise InvalidOption(name="prefill", got=prefill, expected=f"{expected}, since it frees weights irreversibly")
    strict = given.pop("strict", False)
    if not isinstance(strict, bool):
        raise InvalidOption(name="strict", got=strict, expected="True or False")
    return prefill, strict


def _freeing_after_first_run(compiled: Callable[..., Any], weights: list[nn.Parameter]) -> Callable[..., Any]:
    """``compiled``, which frees ``weights`` after its first run: Dynamo makes guards on them between compilation and that run,
    and they would fail for freed weights.
    """

    def run_and_free(*args: Any) -> Any:
        output = compiled(*args)
        # graphs compiled in pieces (DistributedDataParallel) first run on fake tensors
        if weights and mode_of(args) is None:
            with torch.inference_mode(False):
                while weights:
                    free_(weights.pop())
        return output

    return run_and_free


def rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    plan: Plan | None = None,
    prefill: str = "masked",
    strict: bool = False,
) -> Result:
    """Rewrite a Dynamo graph in place, add guards on the weights and the plan that the result depends on, and warn of the
    parts of the plan that are not applied.

    Args:
        gm, example_inputs: as ``backend`` takes them.
        plan: to use instead of the plan attached to the weights.
        prefill: one of ``rana_fx.runtime.prefill.MODES``.
        strict: raise ``NotApplied`` instead of the warning.

    Returns:
        For each pass what it changed, and what it declined with the reason (``Result``).

    Raises:
        NoPlan, PlanMismatch, LoraBeside, WeightsFreed; NotApplied if ``strict``.
    """
    result = run(gm, example_inputs, plan=plan, prefill=prefill)
    if result.matches.missing is not None:
        if plan is None and not _attached_nearby():
            raise NoPlan(site=result.matches.missing)
        notices.report([(result.matches.missing, _UNKNOWN)], _TODO, strict=strict)
    outdated = [place for place in result.not_applied if isinstance(place, Outdated)]
    notices.report(outdated, OUTDATED, strict=strict)
    notices.report((place for place in result.not_applied if place not in outdated), _TODO, strict=strict)
    for attachment in result.matches.attachments if plan is None else ():
        notices.report(disabled_parts(attachment), _TODO, strict=strict)
    _report_lost(gm.graph, result, plan, strict=strict)
    keep_compiling(is_ours)
    weights = result.matches.scan.weights
    if plan is not None:
        guard_weights((node for node in weights if weights[node].dim() >= 2), attachment=False)
    elif result.matches.attachments:
        guard_weights((node for node in weights if attachment_of(weights[node]) is not None), attachment=True)
    return result


def _report_lost(graph: fx.Graph, result: Result, plan: Plan | None, *, strict: bool) -> None:
    """Warn of planned linears whose weights are none of the graph's Parameters, which the search for linears does not see."""
    attachments, weights = result.matches.attachments, result.matches.scan.weights.values()
    said = {place.where for place in result.not_applied}
    if plan is not None:
        plans, lost = [plan], list(gone_by_option(plan, (value for value in _variables() if isinstance(value, nn.Module))))
    else:
        others = [] if attachments else attachments_of_models(_variables())
        for attachment in others:
            adopt(attachment)
        plans = [attachment.plan for attachment in (*attachments, *others)]
        lost = [place for attachment in others for place in gone(attachment)]
    notices.report((place for place in lost if place[0] not in said), OUTDATED, strict=strict)
    present = {attachment.names.get(id(weight)) for attachment in attachments for weight in weights}
    present |= {site for site, _ in lost} | said
    notices.report(in_place_of_planned(graph, plans, present), _TODO, strict=strict)


def rewritten(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend that rewrites the graph and runs it without Inductor: no compilation, slower calls. Raises as ``rewrite``."""
    given = options or {}
    rewrite(gm, example_inputs, prefill=given.get("prefill", "masked"), strict=given.get("strict", False))
    return gm.forward


def is_ours(compiler: Any) -> bool:
    """Whether the compiler function that Dynamo calls is, or wraps, a backend of this module."""
    while compiler is not None:
        if compiler is backend or compiler is rewritten:
            return True
        links = (getattr(compiler, name, None) for name in ("_torchdynamo_orig_backend", "compiler_fn", "func"))
        compiler = next((link for link in links if link is not None), None)
    return False


def _attached_nearby() -> bool:
    """Whether a model of the frame being compiled has a plan attached: this graph may be a part of it without planned weights."""
    return any(attached(value) is not None for value in _variables() if isinstance(value, nn.Module))


def _variables() -> list[object]:
    """The local variables of the code that is being compiled."""
    return list(getattr(translator(), "f_locals", {}).values())


class _PostGrad(CustomGraphPass):
    """Runs ``POST_GRAD``, after a pass set in Inductor's config; adds the plan and the sources to Inductor's cache key."""

    def __init__(self, result: Result, inner: Any = None) -> None:
        self._result = result
        self._plans = "+".join(sorted(attachment.plan.digest() for attachment in result.matches.attachments))
        inner = inner if inner is not None else torch._inductor.config.post_grad_custom_pre_pass
        self._inner: list[Any] = [] if inner is None else list(inner) if isinstance(inner, (list, tuple)) else [inner]

    def __call__(self, graph: fx.Graph) -> None:
        for step in self._inner:
            step(graph)
        run_post_grad(self._result, graph)

    def uuid(self) -> Any:
        inner = [step.uuid() if isinstance(step, CustomGraphPass) else None for step in self._inner]
        # a pass without a key of its own makes the whole compilation uncacheable, as in plain Inductor
        return None if None in inner else (sources_hash(), fingerprint(), self._plans, *inner)


# from here on, methods looked up through torch.compile(model, backend=...) run the compiled model
compiled_methods.install(is_ours)
