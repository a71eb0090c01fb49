"""The far end of the engine tests, with vLLM's GPU attention backend on a CPU: its kernels and ours are interpreted."""

import json
import os
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.backends


class Driver:
    @staticmethod
    def is_active() -> bool:
        return True


# vLLM's CPU build wants a Triton that compiles for CPUs, else it turns its Triton kernels off.
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)  # type: ignore[assignment]
torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)  # a kernel's wrapper asks

from vllm.platforms.cpu import CpuPlatform  # noqa: E402 -- after what it looks for
from vllm.v1.attention.backends import triton_attn  # noqa: E402
from worker import TestWorker, main  # noqa: E402

BACKEND = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
CpuPlatform.get_attn_backend_cls = classmethod(lambda cls, *args, **kwargs: BACKEND)  # type: ignore[assignment]

# Small batches are split into 16 programs for each request and head, which only the interpreter's time shows.
triton_attn.MIN_LAUNCH_GRID_SIZE_2D = 0

configure = CpuPlatform.check_and_update_config


def keep_scheduling_asynchronous() -> None:
    """Let an engine schedule asynchronously as on GPUs; on CPUs the platform turns it off."""

    def check_and_update_config(vllm_config: Any) -> None:
        configure(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)  # type: ignore[assignment]


def replace_compiled_code() -> None:
    """Define in Python what vLLM's CPU platform compiles, which `make setup-033` leaves out."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    for name, signature, function in (
        ("init_cpu_memory_env", "(int[] nodes) -> ()", lambda nodes: None),
        ("greedy_argmax", "(Tensor logits) -> Tensor", lambda logits: logits.argmax(-1)),
    ):
        torch.library.define(f"_C::{name}", signature)
        torch.library.impl(f"_C::{name}", "default", function)
    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native  # type: ignore[method-assign]


if __name__ == "__main__":
    if not find_spec("vllm._C"):
        replace_compiled_code()
    if json.loads(sys.argv[1]).get("async_scheduling"):
        keep_scheduling_asynchronous()
    main(TestWorker)
