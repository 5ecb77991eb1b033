"""One adapted model compiled through Inductor, and what its cache of graphs says. A process of its own prints it as JSON:

python -m tests.support.cached
"""

from __future__ import annotations

import json

import torch
from torch._dynamo.utils import counters

import rana_fx
from tests.support.architectures import build, ids


def found():
    """Counts of Inductor's cache of graphs, by name."""
    model, batch = build("plain", 1)
    torch.manual_seed(1)
    rana_fx.adapt(model, [ids()], budget=0.7, recipe="teal", progress=False)
    counters.clear()
    with torch.no_grad():
        torch.compile(model, backend=rana_fx.backend)(**batch)
    return {name: count for name, count in counters["inductor"].items() if name.startswith("fxgraph_cache")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(found()), flush=True)
