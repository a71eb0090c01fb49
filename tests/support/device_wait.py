"""A check that code does not wait for the device: such code must not read a tensor's values on the host."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

# Methods that return values of a tensor, or a tensor whose size depends on values.
READS = (
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "__iter__",
    "cpu",
    "item",
    "masked_select",
    "nonzero",
    "numpy",
    "tolist",
    "unique",
)


class DeviceWaitError(AssertionError):
    """Code waited for the device."""


@contextlib.contextmanager
def no_device_wait() -> Iterator[None]:
    """Raise `DeviceWaitError` where code reads values of a tensor; on a GPU also at any synchronisation.

    What Triton's interpreter reads does not count: a compiled kernel reads it on the device.
    """
    originals = {name: getattr(torch.Tensor, name) for name in READS}

    def refusing(name: str) -> Any:
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame is not None and not frame.f_globals.get("__name__", "").startswith(("pilotfish", "test_")):
                if frame.f_globals.get("__name__", "").startswith("triton."):
                    return originals[name](self, *args, **kwargs)
                frame = frame.f_back  # type: ignore[assignment]
            raise DeviceWaitError(f"Tensor.{name} waits for the device")

        return method

    gpu = torch.cuda.is_available()
    for name in READS:
        setattr(torch.Tensor, name, refusing(name))
    if gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if gpu:
            torch.cuda.set_sync_debug_mode("default")
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)
