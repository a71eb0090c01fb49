"""Times of calls on a device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

WARM_UP = 5


class Clock:
    """Timer of calls on a device, each with a cold L2 cache.

    On a CPU every call is timed once, without a warm-up.

    Args:
        device: ``cuda`` or ``cpu``.
        repeats: Number of timed calls.
    """

    def __init__(self, device: str, repeats: int) -> None:
        import torch

        self._torch, self._cuda, self.repeats = torch, device == "cuda", repeats
        self._flush = torch.empty(256 << 20 if self._cuda else 1, dtype=torch.int8, device=device)

    def times(self, call: Callable[[], Any]) -> list[float]:
        """Return the duration of each of `repeats` calls in microseconds, measured after a warm-up."""
        if not self._cuda:
            started = time.perf_counter()
            call()
            return [1e6 * (time.perf_counter() - started)]
        pairs = []
        for _ in range(WARM_UP + self.repeats):
            self._flush.zero_()
            begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        self._torch.cuda.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs[WARM_UP:]]

    def graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that replays ``call`` from a CUDA graph, without the launch overhead."""
        side = self._torch.cuda.Stream()
        side.wait_stream(self._torch.cuda.current_stream())
        with self._torch.cuda.stream(side):
            call()
        self._torch.cuda.current_stream().wait_stream(side)
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph):
            call()
        return graph.replay

    def copy_bandwidth(self) -> float:
        """Return the bytes per second that a large copy reads and writes."""
        source = self._torch.empty((1 << 30) if self._cuda else (1 << 24), dtype=self._torch.int8)
        source = source.to("cuda") if self._cuda else source
        target = self._torch.empty_like(source)
        return 2 * source.numel() / (1e-6 * statistics.median(self.times(lambda: target.copy_(source))))
