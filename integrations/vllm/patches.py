"""Everything that Pilotfish replaces in vLLM's classes, in one place: each patch keeps the original and can be undone.

| patch | when | why no registry serves |
|---|---|---|
| `FRONT_DOOR` | always; passes through unless a plugin is selected | vLLM shows its general plugins no configuration |
| `BACKEND` | always; passes through unless a KV policy is selected | the CPU platform takes no registered backend |
| `SCHEDULER` | always; passes through unless a KV policy corrects | a scheduler class of our own would be a fork |
| `DRAFT_MODEL` | a drafter over a draft model is selected | vLLM's own methods take no companion |
| `CAPACITY` | a KV policy frees blocks | vLLM's figure takes every request to be in its prompt |
| `REQUESTS` | a policy frees blocks, a pruner drops rows in layers | vLLM has no hook that refuses a request |
| `COUNTERS` | a drafter or KV policy is selected | a stat-logger plugin switches logging on for all engines |
| `RECORD` | a KV policy frees blocks | statistics have no place for freed blocks; see `head_cache.report_freed` |
| `EXPAND` | a drafter is selected and the self-test fails | vLLM 0.32 on CPU: see `sampling_is_broken` |
| `CONSTRAINTS` | a drafter is selected and the self-test fails | vLLM 0.32 on CPU: see `empty_steps_fail` |

What is wrapped on one model runner (an instance, not a class) is in `runner`.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_ORIGINAL = "__pilotfish_original__"


@dataclass(frozen=True)
class Patch:
    """One attribute of a module or class, replaced by what ``wrap`` makes of the original."""

    module: str
    attribute: str  # dotted, within the module
    wrap: Callable[[Any], Any]

    def _owner(self) -> tuple[Any, str]:
        owner: Any = importlib.import_module(self.module)
        *path, name = self.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, name

    @property
    def applied(self) -> bool:
        """Whether the replacement is in place."""
        owner, name = self._owner()
        return hasattr(getattr(owner, name), _ORIGINAL)

    def apply(self) -> None:
        """Replace the attribute, once."""
        owner, name = self._owner()
        original = getattr(owner, name)
        if hasattr(original, _ORIGINAL):
            return
        replacement = functools.wraps(original)(self.wrap(original))
        setattr(replacement, _ORIGINAL, original)
        setattr(owner, name, replacement)

    def undo(self) -> None:
        """Put the original back."""
        owner, name = self._owner()
        current = getattr(owner, name)
        if hasattr(current, _ORIGINAL):
            setattr(owner, name, getattr(current, _ORIGINAL))


def _front_door(original: Any) -> Any:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from . import attach

        if not attach.concerned(self.additional_config, self.speculative_config):
            return original(self, *args, **kwargs)
        with attach.one_line_errors():
            attach.read(self.additional_config, self.speculative_config)
        config = original(self, *args, **kwargs)
        with attach.one_line_errors():
            attach.admit(config)
        return config

    return create_engine_config


def _backend(original: Any) -> Any:
    def _cached_get_attn_backend(backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> Any:
        stock = original(backend, attn_selector_config, *args, **kwargs)
        from vllm.config import get_current_vllm_config

        from . import attach

        if not attach.concerned(get_current_vllm_config().additional_config):
            return stock
        if attach.over_draft_model(get_current_vllm_config()):
            DRAFT_MODEL.apply()  # here, since all workers build attention layers before they load a draft model
        return attach.attention_backend(stock, get_current_vllm_config())

    return _cached_get_attn_backend


def _scheduler(original: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, vllm_config, *args, **kwargs)
        from . import attach

        if attach.concerned(vllm_config.additional_config):
            from . import correction

            policy = attach.kv_policy(vllm_config)
            correction.install(self, policy)
            if policy is not None and policy.frees_blocks:
                from . import head_cache

                head_cache.report_freed(self, policy.name)

    return __init__


def _draft_model(original: Any) -> Any:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        from . import attach

        if attach.over_draft_model(self.vllm_config):
            from . import draft_model

            draft_model.accompany(self)

    return load_model


def _capacity(original: Any) -> Any:
    def get_max_concurrency_for_kv_cache_config(vllm_config: Any, kv_cache_config: Any) -> float:
        from . import head_cache

        found = head_cache.capacity(kv_cache_config, vllm_config)
        return original(vllm_config, kv_cache_config) if found is None else found

    return get_max_concurrency_for_kv_cache_config


def _requests(original: Any) -> Any:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, resumable: bool = False, **kwargs: Any
    ) -> Any:
        from . import attach

        if reason := attach.refuses(self.vllm_config, params, resumable):
            raise ValueError(f"pilotfish: {reason}")
        return original(self, request_id, prompt, params, *args, resumable=resumable, **kwargs)

    return process_inputs


def _counters(original: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, vllm_config, *args, **kwargs)
        from . import attach, metrics

        chosen = attach.read(vllm_config.additional_config)
        if chosen.drafter is not None:
            self.spec_decoding_prom = metrics.DraftCounters(chosen.drafter.name, self.spec_decoding_prom)
        if chosen.kv is not None:
            metrics.expect_freed(chosen.kv.name)

    return __init__


def _record(original: Any) -> Any:
    def record(self: Any, scheduler_stats: Any, *args: Any, engine_idx: int | None = None, **kwargs: Any) -> None:
        from . import metrics

        if scheduler_stats is not None:
            metrics.take_freed(scheduler_stats, engine_idx or 0)
        original(self, scheduler_stats, *args, engine_idx=engine_idx, **kwargs)

    return record


def _expand(original: Any) -> Any:
    def expand_batch_to_tokens(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        import torch

        counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1, dtype=torch.long))
        expanded = torch.repeat_interleave(x, counts, output_size=num_tokens)
        if replace_from != replace_to:
            expanded = expanded.masked_fill(expanded == replace_from, replace_to)
        return expanded

    return expand_batch_to_tokens


def _constraints(original: Any) -> Any:
    def apply_sampling_constraints(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return original(logits, *args, **kwargs) if logits.shape[0] else logits

    return apply_sampling_constraints


FRONT_DOOR = Patch("vllm.engine.arg_utils", "EngineArgs.create_engine_config", _front_door)
BACKEND = Patch("vllm.v1.attention.selector", "_cached_get_attn_backend", _backend)
SCHEDULER = Patch("vllm.v1.core.sched.scheduler", "Scheduler.__init__", _scheduler)
COUNTERS = Patch("vllm.v1.metrics.loggers", "PrometheusStatLogger.__init__", _counters)
RECORD = Patch("vllm.v1.metrics.loggers", "StatLoggerManager.record", _record)
EXPAND = Patch("vllm.v1.sample.rejection_sampler", "expand_batch_to_tokens", _expand)
CONSTRAINTS = Patch("vllm.v1.sample.rejection_sampler", "apply_sampling_constraints", _constraints)
DRAFT_MODEL = Patch("vllm.v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer.load_model", _draft_model)
CAPACITY = Patch("vllm.v1.core.kv_cache_utils", "get_max_concurrency_for_kv_cache_config", _capacity)
REQUESTS = Patch("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", _requests)
ALL = (FRONT_DOOR, BACKEND, SCHEDULER, DRAFT_MODEL, CAPACITY, REQUESTS, COUNTERS, RECORD, EXPAND, CONSTRAINTS)


def sampling_is_broken() -> bool:
    """Self-test of how vLLM hands a request's temperature, top-p and top-k to its drafted tokens.

    In vLLM 0.32's CPU build ``_expand_kernel_impl`` converts its output to int64 when it has another type, writes into
    that copy and drops it: every speculative method, vLLM's own too, then samples with uninitialised memory.
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    x = torch.tensor([0.5, 2.0, 0.25])
    ends = torch.tensor([1, 3, 4], dtype=torch.int32)
    try:
        return rejection_sampler.expand_batch_to_tokens(x, ends, 4).tolist() != [0.5, 2.0, 2.0, 0.25]
    except Exception:  # a kernel that cannot even run has to be replaced too
        return True


def empty_steps_fail(device: str) -> bool:
    """Self-test of a step in which no request has a draft, while one asks for top-k.

    In vLLM 0.32's CPU build the maximum of an empty tensor is taken there, which ends the engine; every speculative
    method that may propose nothing meets it.
    """
    import torch
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logits, k = torch.empty(0, 8, device=device), torch.empty(0, dtype=torch.int32, device=device)
    try:
        apply_top_k_top_p(logits, k, None)
    except (RuntimeError, IndexError):
        return True
    return False
