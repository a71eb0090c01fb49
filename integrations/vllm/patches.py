"""All patches of vLLM's modules and classes: each patch keeps the original and can be undone.

| patch | applied | why a vLLM registry or hook is not enough |
|---|---|---|
| `CREATE_ENGINE_CONFIG` | always; no effect unless a plugin is selected | general plugins receive no configuration |
| `ATTENTION_BACKEND` | always; no effect unless a plugin is selected | the CPU platform accepts no registered backend |
| `SCHEDULER` | always; no effect unless a plugin is selected | our own scheduler class would be a fork of vLLM's |
| `WORKER` | always; no effect unless a drafter is selected | it applies `SPECULATOR` in the worker's process |
| `SPECULATOR` | a drafter is selected, on the V2 runner | the V2 runner has no method for third-party speculators |
| `DRAFT_MODEL` | a drafter with a draft model is selected | vLLM's speculative methods accept no second proposer |
| `CAPACITY` | a KV policy frees blocks | vLLM's estimate assumes that every request processes its prompt |
| `PROMPT_LENS_V1`, `PROMPT_LENS_V2` | a KV policy frees blocks | attention metadata has no lengths of prompts |
| `REQUESTS` | a KV policy frees blocks, or a pruner prunes in layers | vLLM has no hook that rejects a request |
| `COUNTERS` | a drafter or KV policy is selected | a stat-logger plugin enables logging for all engines |
| `RECORD` | a KV policy frees blocks | vLLM's statistics have no such field; see `kv_cache_spec.report_freed` |

Methods of a single instance are wrapped in `drafting.v1`, `drafting.v2`, `drafting.step_times`,
`attention.sparse.kv_correction` and `attention.windowed.kv_cache_spec`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from .engine.patching import Patch


def _create_engine_config(original: Any) -> Any:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from . import admission
        from .engine import log, selection

        if not selection.is_selected(self.additional_config, self.speculative_config):
            return original(self, *args, **kwargs)
        with log.one_line_errors():
            selection.read_config(self.additional_config, self.speculative_config)
        config = original(self, *args, **kwargs)
        with log.one_line_errors():
            attached = admission.admit(config)
        for patch in _needed(attached):
            patch.apply()
        return config

    return create_engine_config


def _attention_backend(original: Any) -> Any:
    def _cached_get_attn_backend(backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> Any:
        stock = original(backend, attn_selector_config, *args, **kwargs)
        from vllm.config import get_current_vllm_config

        from .attention import backends
        from .engine import selection

        if not selection.is_selected(get_current_vllm_config().additional_config):
            return stock
        if selection.uses_draft_model(get_current_vllm_config()):
            DRAFT_MODEL.apply()  # every worker builds its attention layers before it loads a draft model
        return backends.attention_backend(stock, get_current_vllm_config())

    return _cached_get_attn_backend


def _scheduler(original: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, vllm_config, *args, **kwargs)
        from .engine import selection

        if selection.uses_device_drafter(vllm_config):
            from .drafting.v2 import draft_schedule, scheduling

            scheduling.install_request_switch(self)
            drafting = selection.attach("drafter", vllm_config)
            assert drafting is not None
            verification = drafting.config.verification.verification
            draft_schedule.install_measured_schedule(self, drafting.cls, verification)
        if selection.is_selected(vllm_config.additional_config):
            from .attention.sparse import kv_correction

            policy = selection.kv_policy(vllm_config)
            kv_correction.install_kv_correction(self, policy)
            if policy is not None and policy.frees_blocks:
                from .attention.windowed import kv_cache_spec

                kv_cache_spec.report_freed(self, policy.name)

    return __init__


def _worker(original: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, vllm_config, *args, **kwargs)
        from .engine import selection

        if selection.uses_device_drafter(vllm_config):
            SPECULATOR.apply()  # before the worker constructs its model runner

    return __init__


def _speculator(original: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, vllm_config, *args, **kwargs)
        from .engine import selection

        if selection.uses_device_drafter(vllm_config):
            from .drafting.v2 import speculator

            speculator.attach_speculator(self)

    return __init__


def _draft_model(original: Any) -> Any:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        from .engine import selection

        if selection.uses_draft_model(self.vllm_config):
            from .drafting.v1 import draft_model

            draft_model.attach_to_draft_model(self)

    return load_model


def _requests(original: Any) -> Any:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, resumable: bool = False, **kwargs: Any
    ) -> Any:
        from . import admission

        if reason := admission.refusal(self.vllm_config, params, resumable):
            raise ValueError(f"pilotfish: {reason}")
        return original(self, request_id, prompt, params, *args, resumable=resumable, **kwargs)

    return process_inputs


def _counters(original: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, vllm_config, *args, **kwargs)
        from .engine import metrics, selection

        config = selection.read_config(vllm_config.additional_config)
        if config.drafter is not None:
            self.spec_decoding_prom = metrics.DraftCounters(config.drafter.name, self.spec_decoding_prom)
        if config.kv is not None:
            metrics.register_freed_blocks(config.kv.name)

    return __init__


def _record(original: Any) -> Any:
    def record(self: Any, scheduler_stats: Any, *args: Any, engine_idx: int | None = None, **kwargs: Any) -> None:
        from .engine import metrics

        if scheduler_stats is not None:
            metrics.record_freed_blocks(scheduler_stats, engine_idx or 0)
        original(self, scheduler_stats, *args, engine_idx=engine_idx, **kwargs)

    return record


CREATE_ENGINE_CONFIG = Patch("vllm.engine.arg_utils", "EngineArgs.create_engine_config", _create_engine_config)
ATTENTION_BACKEND = Patch("vllm.v1.attention.selector", "_cached_get_attn_backend", _attention_backend)
SCHEDULER = Patch("vllm.v1.core.sched.scheduler", "Scheduler.__init__", _scheduler)
COUNTERS = Patch("vllm.v1.metrics.loggers", "PrometheusStatLogger.__init__", _counters)
RECORD = Patch("vllm.v1.metrics.loggers", "StatLoggerManager.record", _record)
WORKER = Patch("vllm.v1.worker.worker_base", "WorkerBase.__init__", _worker)
SPECULATOR = Patch("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.__init__", _speculator)
DRAFT_MODEL = Patch("vllm.v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer.load_model", _draft_model)
REQUESTS = Patch("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", _requests)


def _needed(attached: Mapping[str, Any]) -> Iterator[Patch]:
    """Yield the patches that only some plugins need, for the ``attached`` plugins by type."""
    kv, pruner = attached.get("kv"), attached.get("pruner")
    frees_blocks = kv is not None and kv.cls.frees_blocks
    if frees_blocks or (pruner is not None and pruner.cls(pruner.options).layer_schedule() is not None):
        yield REQUESTS
    if frees_blocks:
        yield RECORD
    if kv is not None or "drafter" in attached:
        yield COUNTERS


def all_patches() -> tuple[Patch, ...]:
    """Return all patches of the table above. Importing `CAPACITY` imports vLLM."""
    from .attention.windowed.kv_cache_spec import CAPACITY
    from .attention.windowed.prompt_lengths import PROMPT_LENS_V1, PROMPT_LENS_V2

    return (
        CREATE_ENGINE_CONFIG,
        ATTENTION_BACKEND,
        SCHEDULER,
        WORKER,
        SPECULATOR,
        DRAFT_MODEL,
        CAPACITY,
        PROMPT_LENS_V1,
        PROMPT_LENS_V2,
        REQUESTS,
        COUNTERS,
        RECORD,
    )
