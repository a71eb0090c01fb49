"""Tests of reading the rows of a step."""

import importlib
from importlib.util import find_spec

import pytest
import torch
from device_wait import no_device_wait

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("count", [1, 5, 300])
def test_tokens_and_positions_of_rows(interpreted_triton: None, count: int) -> None:
    module = importlib.import_module("pilotfish.plugins.drafting.rows_triton")
    random = torch.Generator().manual_seed(count)
    input_ids = torch.randint(1, 1000, (400,), generator=random, dtype=torch.int32).to(DEVICE)
    positions = torch.randint(1, 1000, (400,), generator=random).to(DEVICE)
    rows = torch.randint(0, 400, (count,), generator=random).to(DEVICE)
    with no_device_wait():
        ids, at = module.gather_rows(input_ids, positions, rows)
    assert (ids.dtype, at.dtype) == (torch.int32, torch.int64)
    torch.testing.assert_close(ids, input_ids[rows])
    torch.testing.assert_close(at, positions[rows])
