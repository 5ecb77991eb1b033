"""``rana-fx explain``: the linears of a model by role and layers, or one by one: adapted, dense or skipped, and why."""

from __future__ import annotations

from rana_fx.commands import options as o
from rana_fx.commands.record import facts_of, write_json
from rana_fx.commands.screen import LEGEND, Screen

# the model is traced on this text; its content does not matter, but it must be long enough for every layer to run
EXAMPLE = "The model is run once on this sentence, so that torch.compile can trace what it computes."


def command(
    model: o.Model,
    plan: o.PlanDir = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    layers: o.Layers = False,
    json: o.Json = None,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Which linear layers of MODEL can be adapted and why others cannot; with --plan, how the plan adapts them."""
    from rana_fx.commands.loading import load
    from rana_fx.report import explain

    screen = Screen(quiet)
    network, tokenizer, loaded = load(model, plan, dtype=dtype, device=device)
    encoded = tokenizer(EXAMPLE, return_tensors="pt")
    report = explain(network, {key: encoded[key] for key in ("input_ids", "attention_mask")})
    facts = facts_of(
        "explain", seed=None if loaded is None else loaded.seed, model=model, plan=plan, dtype=dtype, device=str(network.device)
    )
    facts |= {"report": report.to_dict()}
    screen.lines(report.lines(layers=layers), whole=True)
    if report.plan is not None:
        screen.lines([f"expected cost per token: flops {report.expected_flops:.4f}, bytes {report.expected_bytes:.4f} of dense"])
    if not layers:
        screen.lines(LEGEND)
    if plan is None:
        screen.next_steps((f"rana-fx adapt {model} --data TEXT --out plan", "make a plan"))
    else:
        screen.next_steps((f"rana-fx generate {model} --plan {plan} --prompt TEXT", "run it"))
    write_json(json, facts)
