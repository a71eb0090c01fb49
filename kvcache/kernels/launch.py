"""Configurations of Triton kernels: the fastest that a device has the resources for."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from triton.runtime.errors import OutOfResources

MIN_DOT_ROWS = 16  # smallest number of rows in a matrix product on tensor cores
SPLITS_AT_ONCE = 16  # splits of a context that a program merges at a time


@dataclass(frozen=True)
class KernelConfig:
    """Options with which a kernel is compiled; see `triton.Config`.

    Attributes:
        rows: Rows (query tokens times query heads of one KV head) of a program; ``BLOCK_M`` in vLLM.
        tile: KV positions per iteration; ``TILE_SIZE`` in vLLM.
        num_warps: Number of warps of a program.
        num_stages: Number of software-pipelining stages.
    """

    rows: int
    tile: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of Triton's launcher."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class KernelConfigs:
    """Configurations in the order of their speed on a large GPU.

    The constants are chosen from ``benchmarks/results/gpu/h200/launch.json``. Smaller GPUs have less shared memory, and
    large heads need more.
    """

    def __init__(self, *configs: KernelConfig) -> None:
        self.configs = configs
        self._first_fitting: dict[Hashable, int] = {}

    def run_first_fitting(self, key: Hashable, launch: Callable[[KernelConfig], Any]) -> None:
        """Call ``launch`` with the first configuration for which the device has the resources.

        Args:
            key: What the resources depend on: device, dtype, head size, and query heads per KV head. The choice is
                remembered for it.
            launch: Function that launches the kernel.

        Raises:
            OutOfResources: The device has too little shared memory for all configurations.
        """
        for i in range(self._first_fitting.get(key, 0), len(self.configs)):
            try:
                launch(self.configs[i])
            except OutOfResources:
                if i == len(self.configs) - 1:
                    raise
            else:
                self._first_fitting[key] = i
                return
