"""What a request says about drafting, in ``vllm_xargs``."""

from typing import Any


def accepts_drafts(sampling_params: Any) -> bool:
    """Return whether a request does not switch the drafter off (``pilotfish_drafter``)."""
    return str(_extra(sampling_params).get("pilotfish_drafter", "on")).lower() not in {"off", "0", "false"}


def tenant_of(sampling_params: Any) -> str | None:
    """Return the tenant that a request names (``pilotfish_tenant``); None if it names none."""
    tenant = _extra(sampling_params).get("pilotfish_tenant")
    return None if tenant is None else str(tenant)


def _extra(sampling_params: Any) -> dict[str, Any]:
    return (sampling_params.extra_args if sampling_params is not None else None) or {}
