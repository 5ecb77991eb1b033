"""Compiles the kernels for sm_90, which needs no GPU, and prints one line of JSON per variant. A program, not a test: it must
import Triton without its interpreter, so test_compiled.py runs it in a process of its own.

Each kernel is compiled from the source that Inductor would copy, and as the launchers would specialise it for aligned operands.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import triton
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as closure_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rana_fx.kernels.int4 import masked_gemv_int4_kernel
from rana_fx.kernels.masked_gemv import masked_gemv_kernel
from rana_fx.kernels.router import router_kernel

POINTERS = {"v": "bf16", "x": "bf16", "z": "bf16", "bias": "bf16", "w": "bf16", "tau": "fp32", "scale": "fp32", "out": "fp32"}
POINTERS |= {"lists": "i32", "counts": "i32"}
UNIT = {"s_vk", "s_tau", "s_wn", "s_bias", "s_sg", "s_xd", "s_wd"}
GEMV = dict(S=8, KS=512, KB=512, GROUP=16, BR=1, BT=1, BM=16, BN=256, SOURCE=0, DOT=False, NARROW=True, HAS_BIAS=False, STAGES=1)
ROUTER = dict(BT=1, BR=8, BD=512, QG=0, PER=1, DOT=False, NARROW=True, LISTED=True, STAGES=1)
DOT = dict(BT=16, DOT=True)

VARIANTS = {
    "scratch": (masked_gemv_kernel, "bf16", GEMV),
    "pipelined": (masked_gemv_kernel, "bf16", GEMV | dict(STAGES=3)),
    "registers": (masked_gemv_kernel, "bf16", GEMV | dict(SOURCE=1, KS=256, KB=256)),
    "listed": (masked_gemv_kernel, "bf16", GEMV | dict(SOURCE=2, KS=64, KB=64, BR=8)),
    "four tokens": (masked_gemv_kernel, "bf16", GEMV | dict(BT=4, BM=4)),
    "sixteen tokens": (masked_gemv_kernel, "bf16", GEMV | DOT | dict(BN=128)),
    "int8": (masked_gemv_kernel, "i8", GEMV | dict(BN=512)),
    "int4": (masked_gemv_int4_kernel, "i32", GEMV | dict(BN=512, QG=64, PER=8)),
    "int4 bytes": (masked_gemv_int4_kernel, "u8", GEMV | dict(BN=512, BM=8, QG=64, PER=2)),
    "router": (router_kernel, "bf16", ROUTER),
    "router int8": (router_kernel, "i8", ROUTER),
    "router int4": (router_kernel, "i32", ROUTER | dict(BD=128, QG=64, PER=8, NARROW=False)),
    "router sixteen tokens": (router_kernel, "bf16", ROUTER | DOT | dict(BR=16, BD=128, STAGES=3)),
}


def pasted(kernel, folder):
    """The kernel from the source that Inductor writes into its own module."""
    path = Path(folder, f"{kernel.__name__}.py")
    path.write_text(f"import triton\nimport triton.language as tl\n@triton.jit\n{closure_of(kernel)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kernel.__name__)


def compiled(kernel, weight, choices):
    signature, constants, attributes = {}, dict(choices), {}
    for index, name in enumerate(kernel.arg_names):
        if name in choices:
            signature[name] = "constexpr"
        elif name in UNIT or (name == "T" and choices["BT"] == 1):
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "*" + (weight if name == "w" else POINTERS[name]) if name in POINTERS else "i32"
            if name != "T":
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def main(folder):
    kernels = {kernel.__name__: pasted(kernel, folder) for kernel, _, _ in VARIANTS.values()}
    for name, (kernel, weight, choices) in VARIANTS.items():
        ptx = compiled(kernels[kernel.__name__], weight, choices).asm["ptx"]
        wide = re.findall(r"evict_first[\w.:]*\.v4\.b32|cp\.async\.cg\.shared\.global", ptx)
        print(json.dumps({"name": name, "wide_loads": len(wide)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
