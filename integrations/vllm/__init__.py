"""Pilotfish plugins for a stock vLLM engine. Importing this package imports neither torch nor vLLM."""

from typing import Any

__all__ = ["PilotfishProposer"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # vLLM resolves "pilotfish.integrations.vllm.PilotfishProposer" by name in its worker; only there torch is needed.
    if name == "PilotfishProposer":
        from .drafting.v1.proposer import PilotfishProposer

        return PilotfishProposer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
