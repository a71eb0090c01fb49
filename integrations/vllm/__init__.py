"""Pilotfish inside a stock vLLM engine. Importing this package imports neither torch nor vLLM."""

from typing import Any

__all__ = ["Drafter"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # vLLM resolves "pilotfish.integrations.vllm.Drafter" by name, inside its worker; only there torch is welcome.
    if name == "Drafter":
        from .drafting.v1.proposer import Drafter

        return Drafter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
