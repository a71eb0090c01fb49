"""Launch options of Triton kernels: the fastest that a device has the resources for."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from triton.runtime.errors import OutOfResources


@dataclass(frozen=True)
class Launch:
    """Options with which a kernel is compiled.

    Attributes:
        rows: Rows (query tokens times query heads) of a program.
        tile: Positions that a program processes at a time.
        num_warps: Number of warps of a program.
        num_stages: Number of tiles that are loaded in advance.
    """

    rows: int
    tile: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of Triton's launcher."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class LaunchList:
    """Launch options in the order of their speed on a large GPU.

    The constants are chosen from ``benchmarks/results/gpu``. Smaller GPUs have less shared memory, and large heads need
    more.
    """

    def __init__(self, *launches: Launch) -> None:
        self.launches = launches
        self._chosen: dict[Hashable, int] = {}

    def run(self, key: Hashable, call: Callable[[Launch], Any]) -> None:
        """Call ``call`` with the first options for which the device has the resources.

        Args:
            key: What the resources depend on: device, dtype and head size. The choice is remembered for it.
            call: Function that launches the kernel.

        Raises:
            OutOfResources: The device has too little shared memory for all options.
        """
        for i in range(self._chosen.get(key, 0), len(self.launches)):
            try:
                call(self.launches[i])
            except OutOfResources:
                if i == len(self.launches) - 1:
                    raise
            else:
                self._chosen[key] = i
                return
