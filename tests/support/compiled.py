"""Compiles the kernels for sm_90, which needs no GPU, and prints one line of JSON per variant, and one for a graph of traced
launches. A program, not a test: it must import Triton without its interpreter, so test_sm90.py runs it in a process of its own.

Each kernel is compiled from the source that Inductor would copy, and specialised for aligned operands as by the launchers.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import torch
import triton
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as closure_of
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rana_fx.kernels.triton.config import Config, Launch
from rana_fx.kernels.triton.decode_attention import decode_attention_kernel
from rana_fx.kernels.triton.masked_gemv import masked_gemv, masked_gemv_kernel
from rana_fx.kernels.triton.masked_gemv_concat import masked_parts_kernel
from rana_fx.kernels.triton.masked_gemv_packed import masked_gemv_packed_kernel
from rana_fx.kernels.triton.masked_rows import masked_rows_kernel
from rana_fx.kernels.triton.router import router, router_kernel

POINTERS = {name: "bf16" for name in ("v", "x", "a", "z", "y", "h", "bias", "w", "q", "k")}
POINTERS |= {
    "residual": "bf16",
    "gain": "bf16",
    "tau": "fp32",
    "scale": "fp32",
    "part": "fp32",
    "lists": "i32",
    "stats": "fp32",
    "mask": "i1",
    "counters": "i32",
}
POINTERS |= {f"{name}_{part}": POINTERS[name] for name in ("tau", "w", "bias") for part in range(3)}
UNIT = {"s_rn", "s_gain", "s_vk", "s_tau", "s_wn", "s_bias", "s_sg", "s_xd", "s_wd", "s_xk", "s_an", "s_wc", "s_qd", "s_ms"}
GEMV = dict(S=32, KS=128, KB=128, GROUP=16, EARLY=0, BT=1, TG=1, BM=4, BN=512, RW=1, SR=8, STAGES=4, WHOLE=True)
GEMV |= dict(ACT=0, HAS_BIAS=False, HAS_RESIDUAL=False, PDL=False, num_warps=2)
PACKED = dict(BN=1024, BM=8, num_warps=4)
INT8, INT4 = PACKED | dict(BITS=8, QG=1024, PER=4, RW=2), PACKED | dict(BITS=4, QG=64, PER=8, RW=4)
PARTS = {name: value for name, value in GEMV.items() if name not in ("ACT", "HAS_RESIDUAL")}
ROUTER = dict(
    BT=1,
    BR=8,
    BD=512,
    AHEAD=0,
    MORE=True,
    STAGES=4,
    PDL=False,
    BITS=16,
    QG=512,
    PER=1,
    NORM=False,
    HAS_GAIN=False,
    EPS=1e-5,
    OFFSET=0.0,
    num_warps=2,
)

ROWS = dict(BT=1, BR=4, BK=512, STAGES=4, HAS_BIAS=False, PDL=False, num_warps=2)

ATTENTION = dict(BM=1, BS=32, BD=128, BE=128, SPLITS=16, MASK=1, ONE_MASK=True, FACTOR=0.1, PDL=True, num_warps=2)

VARIANTS = {
    "default": (masked_gemv_kernel, "bf16", GEMV),
    "in registers": (masked_gemv_kernel, "bf16", GEMV | dict(BM=8, STAGES=1, EARLY=8)),
    "warps along rows": (masked_gemv_kernel, "bf16", GEMV | dict(BM=16, BN=256, RW=4, num_warps=4)),
    "gated": (masked_gemv_kernel, "bf16", GEMV | dict(ACT=1, HAS_BIAS=True)),
    "gated by erf": (masked_gemv_kernel, "bf16", GEMV | dict(ACT=4, BT=4)),
    "four tokens": (masked_gemv_kernel, "bf16", GEMV | dict(BT=4)),
    "sixteen tokens": (masked_gemv_kernel, "bf16", GEMV | dict(BT=4, TG=4)),
    "int8": (masked_gemv_packed_kernel, "i32", GEMV | INT8),
    "int4": (masked_gemv_packed_kernel, "i32", GEMV | INT4),
    "int4 four tokens": (masked_gemv_packed_kernel, "i32", GEMV | INT4 | dict(BT=4, BM=4, ACT=1)),
    "int8 early": (masked_gemv_packed_kernel, "i32", GEMV | INT8 | dict(EARLY=4)),
    "int4 in registers": (masked_gemv_packed_kernel, "i32", GEMV | INT4 | dict(BN=128, BM=32, RW=32, STAGES=1, EARLY=64)),
    "int4 bytes": (masked_gemv_packed_kernel, "u8", GEMV | INT4 | dict(PER=2)),
    "parts": (masked_parts_kernel, "bf16", PARTS | dict(PDL=True, EARLY=8)),
    "parts of four tokens": (masked_parts_kernel, "bf16", PARTS | dict(BT=4, HAS_BIAS=True)),
    "router": (router_kernel, "bf16", ROUTER),
    "behind the previous kernel": (masked_gemv_kernel, "bf16", GEMV | dict(EARLY=8, PDL=True, HAS_RESIDUAL=True)),
    "router behind the previous kernel": (router_kernel, "bf16", ROUTER | dict(AHEAD=4, PDL=True, NORM=True, HAS_GAIN=True)),
    "router four tokens": (router_kernel, "bf16", ROUTER | dict(BT=4)),
    "rows": (masked_rows_kernel, "bf16", ROWS),
    "rows of four tokens": (masked_rows_kernel, "bf16", ROWS | dict(BT=4, HAS_BIAS=True)),
    "rows behind the previous kernel": (masked_rows_kernel, "bf16", ROWS | dict(PDL=True)),
    "router int8": (router_kernel, "i32", ROUTER | dict(BITS=8, BD=256, QG=1024, PER=4)),
    "attention": (decode_attention_kernel, "bf16", ATTENTION),
    "attention of rows": (decode_attention_kernel, "bf16", ATTENTION | dict(BM=16, BS=64, MASK=2, ONE_MASK=False, num_warps=4)),
    "router int4": (router_kernel, "i32", ROUTER | dict(BITS=4, BD=256, QG=64, PER=8)),
}


def pasted(kernel, folder):
    """The kernel from the source that Inductor copies into a generated module."""
    path = Path(folder, f"{kernel.__name__}.py")
    path.write_text(f"import triton\nimport triton.language as tl\n@triton.jit\n{closure_of(kernel)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kernel.__name__)


def compiled(kernel, weight, choices):
    choices, warps = {key: value for key, value in choices.items() if key != "num_warps"}, choices["num_warps"]
    signature, constants, attributes = {}, dict(choices), {}
    for index, name in enumerate(kernel.arg_names):
        if name in choices:
            signature[name] = "constexpr"
        elif name in UNIT or (name == "T" and choices.get("BT") == 1):
            signature[name], constants[name] = "constexpr", 1
        else:
            pointer = weight if name.startswith("w") else POINTERS.get(name)
            signature[name] = "i32" if pointer is None else f"*{pointer}"
            if name != "T":
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def traced():
    """Calls of a graph whose launches are left to Inductor."""

    def function(x, b, tau, w, counters):
        z = router(x, b, how=Launch(traced=True))
        return masked_gemv(z, tau, w, config=Config(4, 64), counters=counters, how=Launch(traced=True))

    shapes = ((1, 64), (32, 64), (32,), (32, 130))
    graph = make_fx(function, tracing_mode="fake")(*map(torch.ones, shapes), torch.zeros(3, dtype=torch.int32)).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def main(folder):
    kernels = {kernel.__name__: pasted(kernel, folder) for kernel, _, _ in VARIANTS.values()}
    for name, (kernel, weight, choices) in VARIANTS.items():
        ptx = compiled(kernels[kernel.__name__], weight, choices).asm["ptx"]
        wide = re.findall(r"(?:evict_first|ld\.global)[\w.:]*\.v4\.b32|cp\.async\.cg\.shared\.global", ptx)
        print(json.dumps({"name": name, "wide_loads": len(wide)}), flush=True)
    print(json.dumps({"targets": traced()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
