"""Tests of the top-k selection on a device against `torch.topk`; its kernels are interpreted if there is no GPU."""

import importlib
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from device_wait import no_device_wait
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:invalid value"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def module(interpreted_triton: None) -> ModuleType:
    return importlib.import_module("pilotfish.plugins.drafting.top_k_triton")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 3),
    width=st.sampled_from([20, 4096, 4097, 9000]),
    k=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1 << 30),
)
def test_matches_torch(module: ModuleType, rows: int, width: int, k: int, dtype: torch.dtype, seed: int) -> None:
    # Distinct values: the order of equal ones is not defined.
    random = torch.Generator().manual_seed(seed)
    distinct = torch.arange(width) - width // 2 if width < 256 else torch.randn(width, generator=random)
    logits = torch.stack([distinct[torch.randperm(width, generator=random)] for _ in range(rows)]).to(dtype).to(DEVICE)
    with no_device_wait():
        ids, probs = module.top_k_probs(logits, k)
    values, _ = logits.topk(k)
    torch.testing.assert_close(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())
    torch.testing.assert_close(probs, values.float().softmax(-1))
