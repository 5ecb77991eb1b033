"""An adapted model for lm-evaluation-harness (``lm_eval``, extra ``eval``), and tasks run on it.

In: a model's folder or hub name and the folder of its plan. Out: ``RanaLM``, registered with lm_eval as "rana" on import of this
module, and ``run_tasks``: scores by task and metric. It is lm_eval's own model for transformers, with the plan attached and the
forward compiled, so requests, padding and scores are those of ``--model hf``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rana_fx._backend import backend, rewritten
from rana_fx.errors import InvalidOption, MissingPackage, ModelError, RanaError
from rana_fx.plan import Plan, as_plan
from rana_fx.runtime.attachment import attach
from rana_fx.runtime.prefill import MODES

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingPackage(what="evaluation on tasks", package="lm_eval", extra="eval") from error

# the paper's downstream tasks, zero-shot for Llama2-7b, five-shot for Gemma-2b
PAPER_TASKS = ("winogrande", "piqa", "arc_easy", "arc_challenge", "hellaswag", "race")


@register_model("rana")
class RanaLM(HFLM):  # type: ignore[misc]
    """``lm_eval.simple_evaluate(model=RanaLM(pretrained=..., plan=...), tasks=...)``."""

    def __init__(
        self,
        pretrained: Any,
        plan: str | Path | Plan,
        *,
        compile: bool = True,
        mode: str = "default",
        prefill: str = "masked",
        dtype: Any = "auto",
        device: str | None = None,
        **others: Any,
    ) -> None:
        """Load the model and attach the plan.

        Args:
            pretrained: folder, hub name, or a transformers model; the plan then stays attached to that.
            plan: a plan, or the folder of one.
            compile: False to run the rewritten graph without Inductor: no compilation, slower calls.
            mode: as torch.compile takes it.
            prefill: the backend's option. A request is scored in one pass over all of its tokens, which for the backend is a
                prompt: with "masked" all of them are adapted, with "dense" none but what a task generates.
            dtype: default: the plan's.
            others: further arguments of lm_eval's HFLM.

        Raises:
            PlanFileError, PlanVersion, PlanMismatch, ModelError, InvalidOption.
        """
        for name, got, valid in (("prefill", prefill, MODES), ("compile", compile, (True, False))):
            if got not in valid:
                raise InvalidOption(name=name, got=got, expected="one of " + ", ".join(map(str, valid)))
        # before the model, so that a wrong path fails fast
        self.plan = as_plan(plan)
        if dtype == "auto":
            dtype = self.plan.sites[0].dtype
        _load(partial(super().__init__, pretrained, dtype=dtype, device=device or _default_device(), **others), pretrained)
        attach(self.model, self.plan)
        options = {"prefill": prefill, "mode": mode}
        # batch sizes and lengths differ between calls: dynamic shapes from the start avoid several compilations
        if compile:
            self.model.compile(backend=backend, options=options, dynamic=True)
        else:
            self.model.compile(backend=rewritten, options=options, dynamic=True)
        self._takes_cache = "use_cache" in inspect.signature(self.model.forward).parameters

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits of a batch, without a cache of keys and values, which nothing would read."""
        if attn_mask is not None or labels is not None or not self._takes_cache:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        autocast = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None):
            scored: Tensor = self.model(inps, use_cache=False).logits
        return scored

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes beside its results."""
        plan = self.plan
        facts = {"plan_digest": plan.digest(), "plan_recipe": plan.recipe, "plan_budget": plan.budget, "plan_metric": plan.metric}
        return {**super().get_model_info(), **facts}


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(make: Callable[[], None], source: object) -> None:
    """Call ``make``. Raises ModelError for any exception of the hub, safetensors, the tokenizer or the model's own code."""
    try:
        make()
    except RanaError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ModelError(source=source, reason=f"{type(error).__name__}: {reason[:300]}") from error


def language_model(pretrained: str, *, plan: str | Path | Plan | None = None, **others: Any) -> HFLM:
    """The adapted model, or with no plan lm_eval's own: the dense one, not compiled. Raises what ``RanaLM`` raises."""
    if plan is not None:
        return RanaLM(pretrained, plan, **others)
    others = {key: value for key, value in others.items() if key not in ("compile", "mode", "prefill")}
    made: list[HFLM] = []
    _load(lambda: made.append(HFLM(pretrained, **others | {"device": others.get("device") or _default_device()})), pretrained)
    return made[0]


def run_tasks(
    model: HFLM,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    include: str | Path | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Scores by task and metric, standard errors beside them as ``<metric>_stderr``.

    Args:
        tasks: task names of lm_eval; "paper" selects ``PAPER_TASKS``.
        shots: worked examples before each question; default: the task's own number.
        limit: maximum number of documents of each task.
        include: folder of further tasks, as lm_eval's ``--include_path``.

    Raises:
        InvalidOption: an unknown task.
    """
    from lm_eval import simple_evaluate

    names = [name for given in tasks for name in (PAPER_TASKS if given == "paper" else (given,))]
    found = simple_evaluate(
        model=model,
        tasks=names,
        num_fewshot=shots,
        limit=limit,
        task_manager=_manager(names, include),
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {task: _scores(values) for task, values in found["results"].items()}


def _manager(names: Sequence[str], include: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include is not None:
        if not Path(include).is_dir():
            raise InvalidOption(name="include", got=str(include), expected="a folder")
        # reading the 14,000 task files of lm_eval takes about 15 s
        included = TaskManager(include_path=str(include), include_defaults=False)
        if all(included.match_tasks([name]) for name in names):
            return included
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        expected = "tasks that `lm_eval ls tasks` lists" + ("" if include is None else f", or that {include} defines")
        raise InvalidOption(name="tasks", got=",".join(unknown), expected=expected)
    return manager


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    """Scores by name: "acc,none" of lm_eval becomes "acc"; a filter other than "none" is appended in parentheses."""
    scores = {}
    for key, value in values.items():
        if not isinstance(value, (int, float)) or "," not in key:
            continue
        name, _, chosen = key.partition(",")
        scores[name if chosen == "none" else f"{name} ({chosen})"] = float(value)
    return scores
