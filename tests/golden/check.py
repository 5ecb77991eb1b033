"""Computations that the maker of the golden files and their test share, through the public API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import rana_fx
from rana_fx._backend import rewritten
from rana_fx.training import Settings, add_lora, train
from tests.golden.model import FFN, FOLDER, Golden, ids, load

EXPLAINED = ("gated-each", "hybrid-stored", "exact")
# consecutive matmuls: q, attention twice, o, up, down in two blocks, up and down in the third, and the head
_DEPTH = 13
# consecutive results that are rounded to the model's dtype: those, norms, activations, products by elements and sums
_ROUNDINGS = 64


def tolerance(dtype: torch.dtype) -> float:
    """Of ``distance``: independent roundings of results in ``dtype``, and of sums of at most FFN terms in fp32."""
    return torch.finfo(dtype).eps * _ROUNDINGS**0.5 + torch.finfo(torch.float32).eps * (FFN * _DEPTH) ** 0.5


def distance(got: torch.Tensor, right: torch.Tensor) -> float:
    return float((got.double() - right.double()).norm() / right.double().norm())


def compiled(model: Golden) -> Any:
    """The model with its rewritten graph, without Inductor. A model without a plan runs eagerly."""
    torch._dynamo.reset()
    return torch.compile(model, backend=rewritten)


def logits(model: Golden) -> torch.Tensor:
    forward = compiled(model) if hasattr(model, "rana_fx") else model
    with torch.no_grad():
        return forward(**ids()).logits.float()


def adapted(name: str) -> Golden:
    """The model with a golden plan attached, which checks digests of its weights."""
    plan = rana_fx.load_plan(FOLDER / "plans" / name)
    model = load(getattr(torch, plan.sites[0].dtype))
    rana_fx.attach(model, plan)
    return model


def weights_to_digest() -> dict[str, torch.Tensor]:
    """Weights of every dtype, and views of them: transposed, and a part."""
    found = {}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        model = load(dtype)
        for name in ("blocks.0.v", "blocks.1.down.weight"):
            weight = model.get_parameter(name).detach()
            found[f"{name} {dtype}"] = weight
            found[f"{name} {dtype} transposed"] = weight.t()
            found[f"{name} {dtype} part"] = weight[1::2, 2:7]
    integers = (load().get_parameter("blocks.1.down.weight").detach() * 64).round() % 16
    return found | {"integers torch.int8": (integers - 8).to(torch.int8), "integers torch.uint8": integers.to(torch.uint8)}


def lora_config() -> Any:
    from peft import LoraConfig

    targets = ["*.a0_*", "rana_fx.a2_router", "blocks.1.o", "head"]
    return LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=targets)


class _Stopped(list[Any]):
    """Batches; reading those of step ``at`` interrupts the training."""

    at: int | None = None

    def __getitem__(self, index: Any) -> Any:
        if self.at is not None and isinstance(index, slice) and index.start == self.at:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def trained(folder: Path | None, *, resume: bool = False, stop: int | None = None) -> list[float]:
    """Losses of four steps of LoRA on the plan "rank", on tokens whose values are not within rounding of a threshold."""
    model = adapted("rank")
    add_lora(model, lora_config())
    batches = _Stopped([ids()] * 4)
    batches.at = stop
    settings = Settings(rate=1e-3, checkpoint_every=2)
    try:
        return train(compiled(model), batches, settings=settings, folder=folder, resume=resume, progress=False).losses
    except KeyboardInterrupt:
        assert stop is not None
        return []


def explained(model: Golden) -> dict[str, Any]:
    """``rana_fx.explain`` without prose."""
    facts = rana_fx.explain(model, ids()).to_dict()
    rows = [{key: value for key, value in row.items() if key != "detail"} for row in facts["rows"]]
    return {key: value for key, value in facts.items() if key != "notes"} | {"rows": rows}
