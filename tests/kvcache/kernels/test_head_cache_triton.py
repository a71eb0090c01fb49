"""Tests of the Triton kernels for heads with separate KV blocks, interpreted if there is no GPU."""

import importlib
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
from growing import Text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.kvcache.head_window import HeadWindow

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value"),  # from NumPy, in Triton's interpreter
]
ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]  # interpreted bfloat16 is wrong


@pytest.fixture(scope="module")
def kernels(interpreted_triton: None) -> ModuleType:
    """Return the kernel module; its kernels are interpreted if there is no GPU."""
    return importlib.import_module("pilotfish.kvcache.kernels.head_cache_triton")


class OnGPU(Text):
    """Requests computed by the Triton kernels."""

    device = "cuda" if ON_GPU else "cpu"

    def __init__(self, kernels: ModuleType, *args) -> None:
        self.kernels = kernels
        super().__init__(*args)

    def make_caches(self, caches, windowed, window):
        return self.kernels.TritonHeadCaches(caches, windowed, window)

    def make_step(self, begins, ends, prompt_len):
        lengths = [e - b for b, e in zip(begins, ends, strict=True)]
        return self.kernels.TritonWindowedStep(
            torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=self.device),
            torch.tensor(ends, dtype=torch.int32, device=self.device),
            torch.full((len(ends),), prompt_len, dtype=torch.int32, device=self.device),
            max(lengths),
            max(ends) + 40,
        )


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(40, 200), min_size=1, max_size=2),
    windowed=st.lists(st.booleans(), min_size=1, max_size=3),
    share=st.sampled_from([1, 3, 4]),
    size=st.sampled_from([32, 64, 80]),
    block=st.sampled_from([16, 32]),
    dtype=st.sampled_from(DTYPES),
    sinks=st.integers(0, 40),
    length=st.integers(1, 100),
    ratio=st.sampled_from([0, 2, 5]),
    compensation=st.booleans(),
    exact=st.booleans(),
    seed=st.integers(0, 1 << 30),
    chunk=st.integers(50, 200),
)
def test_attention_matches_naive_windowed_attention(
    kernels, lengths, windowed, share, size, block, dtype, sinks, length, ratio, compensation, exact, seed, chunk
) -> None:
    window = HeadWindow(sinks, length, ratio, compensation, exact)
    text = OnGPU(kernels, lengths, windowed, share, size, block, dtype, window, seed)
    text.grow(chunk)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_long_contexts_are_split_on_gpu(kernels) -> None:
    window = HeadWindow(4, 512, 5, True, exact_prefill=False)
    text = OnGPU(kernels, [6000, 900], [True, False, True, True], 4, 128, 16, torch.bfloat16, window, 3)
    done = [0, 0]
    for ends in ([2048, 512], [4096, 512], [5998, 898], [5999, 899], [6000, 900]):
        text.check(done, ends)
        done = ends


@pytest.mark.parametrize("room", [0, 6])
def test_refuses_blocks_without_room_for_means(kernels, room: int) -> None:
    memory = torch.zeros(4, 32 * 128 + room)
    cache = memory.as_strided((4, 1, 32, 128), (32 * 128 + room, 32 * 128, 128, 1))
    with pytest.raises(ValueError, match="no room for means"):
        kernels.TritonHeadCaches([cache], [True], HeadWindow(4, 64, 0, True, False))
    kernels.TritonHeadCaches([cache], [False], HeadWindow(4, 64, 0, True, False))
