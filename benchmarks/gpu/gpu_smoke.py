"""Smoke test: GPU, driver and torch, one compiled Triton kernel, and the rates of a copy and a matrix product."""

import argparse
import statistics
import time
from typing import Any, cast

import torch
import triton
import triton.language as tl
from gpu_common import Step, print_now

from pilotfish.integrations.vllm.bench.device_clock import Clock

jit = cast(Any, triton.jit)  # its stub does not declare that kernels are launched by subscripts


@jit
def scale_and_add(x, y, out, n, factor, BLOCK: tl.constexpr):  # noqa: N803
    """Store ``factor * x + y`` in ``out``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = factor * tl.load(x + at, mask=at < n) + tl.load(y + at, mask=at < n)
    tl.store(out + at, value, mask=at < n)


def work(step: Step) -> None:
    """Describe the device, then check a kernel and measure the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    device = parser.parse_args().device
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device")
        properties = torch.cuda.get_device_properties(0)
        step.notes["device"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": properties.L2_cache_size >> 20,
        }
        print_now(str(step.notes["device"]))
    n = 1_000_003
    x, y = (torch.randn(n, device=device) for _ in range(2))
    out = torch.full_like(x, float("nan"))
    started = time.perf_counter()
    scale_and_add[(triton.cdiv(n, 1024),)](x, y, out, n, 2.0, BLOCK=1024)
    if device == "cuda":
        torch.cuda.synchronize()
    step.add("smoke", "triton", "first_call_s", time.perf_counter() - started, "s")
    error = float((out - (2 * x + y)).abs().max())
    step.add("smoke", "triton", "worst_error", error, "")
    if not error < 1e-5:
        step.fail(f"the Triton kernel is wrong: largest absolute error {error:.3g}, allowed 1e-05")
    clock = Clock(device, 20)
    step.add("smoke", "copy", "bandwidth", clock.copy_bandwidth() / 1e9, "GB/s")
    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = 1e-6 * statistics.median(clock.times(lambda: a @ b))
    step.add("smoke", "matmul_bf16", "rate", 2e-12 * size**3 / seconds, "TFLOP/s", size=size)


if __name__ == "__main__":
    Step("smoke").run(work)
