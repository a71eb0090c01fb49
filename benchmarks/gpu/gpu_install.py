"""Check that vLLM can be imported from the folder of unpack.py and that its libraries load. No GPU is needed."""

import importlib
import time

import torch
from gpu_common import Step

MODULES = (
    "vllm",
    "vllm._C_stable_libtorch",
    "vllm.vllm_flash_attn",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen2",
    "pilotfish.integrations.vllm.plugin",
    "pilotfish.integrations.vllm.attention.sparse.flash_attn",
    "pilotfish.integrations.vllm.attention.windowed.triton",
    "pilotfish.integrations.vllm.drafting.v1.proposer",
)
LIBRARIES = {"_C": 100, "_C_cache_ops": 10, "_vllm_fa3_C": 2}  # namespace: smallest number of operators expected


def work(step: Step) -> None:
    """Import every module, then check the operators, the platform, the plugins and the vLLM APIs."""
    for name in MODULES:
        started = time.perf_counter()
        try:
            importlib.import_module(name)
        except Exception as error:
            step.fail(f"import {name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        step.add("import", name, "seconds", time.perf_counter() - started, "s")
    names = [schema.name.split("::") for schema in torch._C._jit_get_all_schemas()]
    for namespace, minimum in LIBRARIES.items():
        count = sum(name[0] == namespace for name in names)
        step.add("operators", namespace, "count", count, "")
        if count < minimum:
            step.fail(f"{namespace}: {count} operators, at least {minimum} expected")
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    from pilotfish.integrations.vllm.engine import vllm_api
    from pilotfish.plugins.manager import plugins

    step.notes["classes"] = [LLM.__name__, SamplingParams.__name__]
    step.notes["platform"] = type(current_platform).__name__
    step.notes["plugins_that_failed"] = [f"{f.plugin}: {f.error}" for f in plugins().failures]
    if problem := vllm_api.version_problem():
        step.fail(f"pilotfish: {problem[0]}")
    if torch.cuda.is_available() and not current_platform.is_cuda():
        step.fail(f"vLLM selected the platform {type(current_platform).__name__}, not CUDA")


if __name__ == "__main__":
    Step("install").run(work)
