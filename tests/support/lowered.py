"""Prints code that Inductor generates for a GPU, without one: a line of JSON for each argument "tokens,layers,kind", or
"tokens,layers,kind,graphs" for code that CUDA graphs repeat. A program, not a test: it patches in an H200 and must import
Triton without its interpreter, so test_lower_triton.py runs it in one process of its own for all requests.

    out = r + (silu(g) * u) W2   with   [g, u] = mask(router(norm(r))) W
    or, as "masks",              with   g, u = mask(norm(r)) Wg, mask(norm(r)) Wu
    or, as "attention", r + attention(q, k, v) with   q = mask(router(r)) W, of which two heads read one of a cache's heads
    or, as "packed",    r + mask(router(norm(r))) W   with the router in 4 bits, for a CUDA graph
    or, as "gate",      r + (mask(silu(g)) * u) W2   with   g, u = norm(r) Wg, norm(r) Wu
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import types
from unittest.mock import patch

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import hints
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

from rana_fx.kernels.attention import decode_attention
from rana_fx.kernels.cuda import implementations, router_implementations
from rana_fx.kernels.ops import masked_gemv, masked_rows, router
from rana_fx.passes import POST_GRAD, lower
from rana_fx.passes.base import PostGrad
from rana_fx.passes.runner import Runner

RANKS, WIDTH, FFN = 2800, 4096, 11008
HEADS, KEYS = 32, 1536


def layer(gain, b, tau, w, tau2, w2, r):
    wide = r.float()
    x = gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(r.dtype)
    gate, up = masked_gemv(router(x, b), tau, w).chunk(2, -1)
    return r + masked_gemv(torch.nn.functional.silu(gate) * up, tau2, w2)


def layer_of_masks(gain, tau_g, w_g, tau_u, w_u, tau2, w2, r):
    wide = r.float()
    x = gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(r.dtype)
    gate, up = masked_gemv(x, tau_g, w_g.t()), masked_gemv(x, tau_u, w_u.t())
    return r + masked_gemv(torch.nn.functional.silu(gate) * up, tau2, w2)


def layer_of_a_gate(gain, w_g, w_u, tau2, w2, r):
    wide = r.float()
    x = gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(r.dtype)
    gate = torch.nn.functional.silu(torch.nn.functional.linear(x, w_g))
    gate = torch.where(gate.float().square() >= 0.01, gate, 0.0)
    return r + masked_gemv(masked_rows(x, gate, w_u), tau2, w2)


def layer_of_attention(b, tau, w, k, v, mask, r):
    q = masked_gemv(router(r, b), tau, w).view(*r.shape[:2], HEADS, -1).transpose(1, 2)
    # as Hugging Face repeats heads
    repeated = (x.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(1, HEADS, *x.shape[2:]) for x in (k, v))
    y = decode_attention(q, *repeated, mask.expand(1, HEADS, *mask.shape[2:]), 0.1)
    return r + y.transpose(1, 2).reshape(r.shape)


def layer_of_packed_routers(gain, b, b_scale, tau, w, r):
    wide = r.float()
    x = gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(r.dtype)
    return r + masked_gemv(router(x, b, b_scale), tau, w)


class Driver:
    """The parts of Triton's driver that Inductor uses during code generation."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        return None


class Written(Exception):
    """Ends the compilation before the generated code is loaded."""


def pretend(stack):
    """Patch functions that query a GPU."""
    sizes = dict(multi_processor_count=132, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, warp_size=32)
    known = sizes | dict(type="cuda", index=0, cc=90, major=9, max_threads_per_block=1024)
    kind = hints.DeviceProperties
    names = kind._fields if hasattr(kind, "_fields") else [field.name for field in dataclasses.fields(kind)]
    device = kind(**{name: known[name] for name in names if name in known})
    memory = dict(total_memory=140 << 30, shared_memory_per_block_optin=232448, gcnArchName="")
    properties = types.SimpleNamespace(name="NVIDIA H200", minor=0, **sizes, **memory, major=9)
    triton.runtime.driver.set_active(Driver())
    for target, value in {
        "torch.cuda.get_device_properties": properties,
        "torch.cuda.get_device_capability": (9, 0),
        "torch.cuda.current_device": 0,
        "torch.cuda.device_count": 1,
        "torch.utils._triton.has_triton": True,
        "torch._inductor.utils.has_triton": True,
        "torch._inductor.scheduler.has_triton": True,
        "torch._inductor.compile_fx._check_triton_bf16_support": None,
    }.items():
        with contextlib.suppress(AttributeError):
            stack.enter_context(patch(target, lambda *_, value=value, **__: value))
    for name, value in {"is_triton_capable": True, "get_compute_capability": 90, "raise_if_triton_unavailable": None}.items():
        if hasattr(CudaInterface, name):
            stack.enter_context(patch.object(CudaInterface, name, staticmethod(lambda *_, value=value, **__: value)))
    stack.enter_context(patch.object(router_implementations, "_device", lambda device: None))
    stack.enter_context(patch.object(hints.DeviceProperties, "create", lambda *_, **__: device))


def written(tokens, count, kind, graphs=False):
    """The code for so many tokens and layers. graphs: that CUDA graphs repeat."""
    lower.register()
    code = []

    def write(self):
        code.append(self.codegen()[0])
        raise Written

    with contextlib.ExitStack() as stack, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        pretend(stack)
        stack.enter_context(patch.object(GraphLowering, "compile_to_module", write))
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1))
        stack.enter_context(torch._inductor.config.patch({"triton.cudagraphs": graphs or kind == "packed"}))
        stack.enter_context(patch.object(implementations, "_device", lambda _: None))  # NVRTC compiles nothing

        def empty(*size, dtype=torch.bfloat16):
            return torch.empty(size, dtype=dtype, device="cuda")

        def tau(ranks):
            return empty(ranks, dtype=torch.float32)

        inputs = [empty(1, tokens, WIDTH)]
        for _ in range(count):
            first = empty(RANKS, WIDTH), tau(RANKS), empty(RANKS, 2 * FFN)
            if kind == "gate":
                first = empty(FFN, WIDTH), empty(FFN, WIDTH)
            elif kind == "masks":
                # (out, in), stored by columns
                first = tau(WIDTH), empty(WIDTH, FFN).t(), tau(WIDTH), empty(WIDTH, FFN).t()
            if kind == "packed":
                packed = empty(RANKS, WIDTH // 2, dtype=torch.uint8), empty(RANKS, WIDTH // 64)
                inputs += [empty(WIDTH), *packed, tau(RANKS), empty(RANKS, WIDTH)]
                continue
            if kind == "attention":
                cache = [empty(1, HEADS // 2, KEYS, WIDTH // HEADS) for _ in range(2)]
                inputs += [
                    empty(RANKS, WIDTH),
                    tau(RANKS),
                    empty(RANKS, WIDTH),
                    *cache,
                    empty(1, 1, tokens, KEYS, dtype=torch.bool),
                ]
                continue
            inputs += [empty(WIDTH), *first, tau(FFN), empty(FFN, WIDTH)]
        one = {
            "ranks": layer,
            "masks": layer_of_masks,
            "gate": layer_of_a_gate,
            "packed": layer_of_packed_routers,
            "attention": layer_of_attention,
        }[kind]

        def layers(r, *weights):
            size = len(weights) // count
            for first in range(0, len(weights), size):
                r = one(*weights[first : first + size], r)
            return (r,)

        graph = make_fx(layers, decomposition_table=select_decomp_table())(*inputs)
        Runner().run(POST_GRAD, graph, PostGrad(), past_autograd=True)
        try:
            with V.set_fake_mode(mode):
                compile_fx_inner(graph, inputs, is_inference=True, static_input_idxs=range(1, len(inputs)))
        except Exception:  # Written, wrapped in an exception of Inductor
            if not code:
                raise
    return getattr(code[0], "value", code[0])


if __name__ == "__main__":
    for request in sys.argv[1:]:
        tokens, count, kind, *graphs = request.split(",")
        print(json.dumps({"request": request, "code": written(int(tokens), int(count), kind, bool(graphs))}), flush=True)
