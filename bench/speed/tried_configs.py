"""Which launch config is fast at all masked fractions, from rows of ``bench.kernels --tune``.

In: rows with ``tried``, the time of each config. Out: for each kernel, matmul, storage and number of tokens the configs by their
time over that of the fastest, at worst over masked fractions, and a table of the first few and the default.
"""

from __future__ import annotations

from typing import Any

from rana_fx.commands.record import show

_SHOWN = 4


def worst_ratios(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[tuple[float, str, bool]]]:
    """By (kernel, matmul, bits, tokens): (time over the fastest one's, at worst; config; whether it is the default), in order."""
    ratios: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    defaults: dict[tuple[Any, ...], str] = {}
    for row in rows:
        tried = [one for one in row.get("tried") or () if one["passed"]]
        if not tried:
            continue
        key = (row["impl"], row["shape"], row["bits"], row["tokens"])
        least = min(one["us"] for one in tried)
        # a config may be tried twice, as the default and as one of the others
        times = {_label(one["config"]): one["us"] for one in reversed(tried)}
        defaults.setdefault(key, _label(row["tried"][0]["config"]))
        for label, us in times.items():
            ratios.setdefault(key, {}).setdefault(label, []).append(us / least if least else 1.0)
    found = {}
    for key, of_configs in ratios.items():
        shares = max(map(len, of_configs.values()))
        # one that is not correct, or not a candidate, at some fraction is left out
        worst = [(max(many), label, label == defaults[key]) for label, many in of_configs.items() if len(many) == shares]
        found[key] = sorted(worst)
    return found


def configs_table(rows: list[dict[str, Any]]) -> None:
    """Print the configs that are closest to the fastest, and the default; nothing where none were tried."""
    lines = []
    for (impl, shape, bits, tokens), worst in worst_ratios(rows).items():
        for rank, (ratio, label, default) in enumerate(worst, 1):
            if rank <= _SHOWN or default:
                lines.append((shape, tokens, bits, impl, rank, label, ratio, "default" if default else ""))
    if lines:
        columns = ("shape", "tokens", "bits", "kernel", "rank", "config", "worst ratio", "")
        show("Configs, by their time over that of the fastest, at worst over masked fractions", columns, lines)


def _label(config: dict[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in config.items())
