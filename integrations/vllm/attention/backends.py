"""Mapping from vLLM's attention backends to our subclasses, which serve a KV policy or tree verification."""

from typing import Any

from ....plugins.contracts import Unsupported
from ..engine.selection import kv_policy, read_config


def attention_backend(stock: type, vllm_config: Any) -> type:
    """Return the attention backend of a layer: ours if a KV policy or tree verification is selected, else vLLM's.

    Args:
        stock: Backend class that vLLM selected for the layer.
        vllm_config: vLLM's configuration of the engine.

    Raises:
        Unsupported: We have no subclass of this backend.
    """
    config = read_config(vllm_config.additional_config)
    name = stock.get_name()  # type: ignore[attr-defined]
    if config.drafter is not None and config.verification.verification == "tree":
        on_v2 = getattr(vllm_config, "use_v2_model_runner", False)
        if name == "CPU_ATTN" and not on_v2:
            from .tree.cpu import TreeCPUBackend

            return TreeCPUBackend
        if name in ("TRITON_ATTN", "FLASH_ATTN"):  # both use our kernels
            if on_v2:
                from .tree.device import DeviceTreeBackend

                return DeviceTreeBackend
            from .tree.triton import TreeTritonBackend

            return TreeTritonBackend
        raise Unsupported(
            config.drafter.name,
            f"tree verification does not support the attention backend {name}",
            "use verification=chain",
            vllm_config.model_config.model,
        )
    policy = kv_policy(vllm_config)
    if policy is None:
        return stock
    if policy.frees_blocks:
        if name == "CPU_ATTN":
            from .windowed.cpu import WindowedCPUBackend

            return WindowedCPUBackend
        if name in ("TRITON_ATTN", "FLASH_ATTN"):  # both use our kernels
            from .windowed.triton import WindowedTritonBackend

            return WindowedTritonBackend
        raise Unsupported(
            policy.name,
            f"it does not support the attention backend {name}",
            "use --attention-backend TRITON_ATTN",
            vllm_config.model_config.model,
        )
    plan = policy.read_plan()
    keeps_bounds = plan is not None and plan.keeps_page_bounds
    if name == "CPU_ATTN":
        from .sparse.cpu import SparseCPUBackend
        from .sparse.page_bounds import PageBoundsCPUBackend

        return PageBoundsCPUBackend if keeps_bounds else SparseCPUBackend
    if name == "TRITON_ATTN":
        from .sparse.page_bounds_triton import PageBoundsTritonBackend
        from .sparse.triton import SparseTritonBackend

        return PageBoundsTritonBackend if keeps_bounds else SparseTritonBackend
    if name == "FLASH_ATTN":
        from .sparse.flash_attn import PageBoundsFlashBackend, SparseFlashBackend

        return PageBoundsFlashBackend if keeps_bounds else SparseFlashBackend
    raise Unsupported(
        policy.name,
        f"it does not support the attention backend {name}",
        "use --attention-backend TRITON_ATTN or FLASH_ATTN",
        vllm_config.model_config.model,
    )
