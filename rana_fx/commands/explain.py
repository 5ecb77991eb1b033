"""``rana-fx explain``: every linear of a model, adapted, dense or skipped, and why."""

from __future__ import annotations

from rana_fx.commands import options as o
from rana_fx.commands.record import facts_of, show, write_json

# the model is traced on this text; its content does not matter, but it must be long enough for every layer to run
EXAMPLE = "The model is run once on this sentence, so that torch.compile can trace what it computes."


def command(
    model: o.Model,
    plan: o.PlanDir = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    json: o.Json = None,
) -> None:
    """List every linear layer of MODEL, whether it can be adapted and why; with --plan, how the plan adapts it."""
    from rana_fx.evaluation.perplexity import load_model
    from rana_fx.plan import load_plan
    from rana_fx.report import explain
    from rana_fx.runtime.attachment import attach

    loaded = None if plan is None else load_plan(plan)
    network, tokenizer = load_model(model, dtype=dtype, device=device)
    if loaded is not None:
        attach(network, loaded)
    encoded = tokenizer(EXAMPLE, return_tensors="pt")
    report = explain(network, {key: encoded[key] for key in ("input_ids", "attention_mask")})
    facts = facts_of(
        "explain", seed=None if loaded is None else loaded.seed, model=model, plan=plan, dtype=dtype, device=str(network.device)
    )
    facts |= {"report": report.to_dict()}
    state = "no plan attached" if report.plan is None else f"plan {report.plan}"
    show(
        f"{report.model}: {report.sites} linears in {report.groups} groups, {report.blocks} MLP blocks, "
        f"{report.graphs} graph(s); {state}",
        ("linear", "role", "op", "shape", "action", "flops", "bytes", "why"),
        [
            (row.site, row.role, row.op, "x".join(map(str, row.shape)), row.action, row.flops, row.bytes, row.detail)
            for row in report.rows
        ],
        notes=[]
        if report.plan is None
        else [f"expected cost per token: flops {report.expected_flops:.4f}, bytes {report.expected_bytes:.4f} of dense"],
    )
    write_json(json, facts)
