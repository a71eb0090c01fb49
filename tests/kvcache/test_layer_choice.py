"""Tests of the dynamic program for layer selection, against an exhaustive search over all sets of layers."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.kvcache.layer_choice import best_layer_choices


def loss_of(missed: np.ndarray, select: tuple[int, ...]) -> float:
    total, selection_layer = 0.0, None
    for layer in range(len(missed)):
        if layer in select:
            selection_layer = layer
        elif selection_layer is not None:
            total += missed[selection_layer, layer]
    return total


@given(st.integers(1, 7), st.integers(0, 1000))
def test_choices_have_the_lowest_loss_of_all_layer_sets(layers: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    missed = rng.random((layers, layers))
    choices = best_layer_choices(missed)
    assert [c.num_full_layers for c in choices] == list(range(1, layers + 1))
    for choice in choices:
        assert choice.full == tuple(range(choice.select[0]))
        assert choice.loss == pytest.approx(loss_of(missed, choice.select))
        others = (
            s
            for k in range(1, layers + 1)
            for s in combinations(range(layers), k)
            if s[0] + len(s) == choice.num_full_layers  # the layers before the first one are full-attention layers
        )
        assert choice.loss == pytest.approx(min(loss_of(missed, s) for s in others))


def test_number_of_full_layers_can_be_bounded() -> None:
    missed = 1 - np.eye(12)
    assert len(best_layer_choices(missed, most=4)) == 4
    assert best_layer_choices(missed)[-1].loss == 0
