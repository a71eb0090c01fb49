"""Tests of the visual pruners against naive loops that follow the papers, and of their properties on any layout."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pilotfish.integrations.vllm.vision import layouts
from pilotfish.plugins.aim import AIM, AIMOptions, merge_step, merged_count
from pilotfish.plugins.contracts import ImageFeatures, ImageLayout, VisualPruner
from pilotfish.plugins.diversity import (
    PROJECTION_DIM,
    Diversity,
    DiversityOptions,
    random_projection,
    select_determinantal,
    select_farthest,
)
from pilotfish.plugins.globalcom2 import GlobalCom2, GlobalCom2Options
from pilotfish.plugins.pruning import grids
from pilotfish.plugins.pruning.token_budget import allocate_tokens

WIDTH, PATCH = 8, 14


def config(side: int, most: int = 3) -> SimpleNamespace:
    size = side * PATCH
    pinpoints = [[size * a, size * b] for a in range(1, most + 1) for b in range(1, most + 1) if a * b <= 16]
    vision = SimpleNamespace(image_size=size, patch_size=PATCH)
    return SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)


def make_features(layout: ImageLayout, seed: int = 0) -> ImageFeatures:
    random = torch.Generator().manual_seed(seed)
    views = 1 + layout.crops[0] * layout.crops[1]
    return ImageFeatures(
        torch.randn(layout.num_tokens, WIDTH, generator=random),
        torch.randn(views, layout.side**2, generator=random),
    )


sizes = st.tuples(st.integers(1, 2000), st.integers(1, 2000))
kinds = st.sampled_from([layouts.single_view, layouts.anyres_layout, layouts.pooled_layout])
retains = st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.75, 1.0])


def pruners(retain: float) -> list[VisualPruner]:
    steps = {0.05: 4, 0.1: 3, 0.25: 2, 0.5: 1}.get(retain, 0)
    return [
        GlobalCom2(GlobalCom2Options(retain)),
        Diversity(DiversityOptions(retain)),
        Diversity(DiversityOptions(retain, "determinantal")),
        AIM(AIMOptions(steps)),
        AIM(AIMOptions(steps, "published")),
    ]


@settings(max_examples=1000, deadline=None)
@given(kinds, sizes, retains, st.integers(0, 5), st.integers(0, 4))
def test_number_of_kept_tokens_matches_the_plan(
    kind, size: tuple[int, int], retain: float, seed: int, which: int
) -> None:
    layout = kind(config(4, 4), *size)
    features = make_features(layout, seed)
    pruner = pruners(retain)[which]
    plan = pruner.plan(layout)
    assert plan.num_tokens == sum(plan.parts.values())
    kept = pruner.select(layout, plan, features)
    assert len(kept) == plan.num_tokens == len(set(kept.tolist()))
    assert pruner.apply(layout, plan, features).shape == (plan.num_tokens, WIDTH)
    if retain == 1:
        assert torch.equal(pruner.apply(layout, plan, features), features.tokens)


@settings(max_examples=200, deadline=None)
@given(kinds, sizes)
def test_crop_regions_tile_the_grid(kind, size: tuple[int, int]) -> None:
    layout = kind(config(5, 4), *size)
    covered = torch.zeros(layout.grid, dtype=torch.int)
    for top, bottom, left, right in layout.crop_regions:
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all()
    indices = torch.cat(grids.view_token_indices(layout, torch.device("cpu"))).tolist()
    assert len(indices) == len(set(indices)) == layout.num_tokens - layout.num_newlines


def naive_globalcom2(layout: ImageLayout, scores: torch.Tensor, retain: float, tau: float) -> set[int]:
    """Return the kept indices of GlobalCom2, computed in loops over tokens."""
    side, (rows, columns), (top, _, left, _) = layout.side, layout.crops, layout.crop_region
    s, (height, width) = scores.double().tolist(), layout.grid
    kept = set(sorted(range(side * side), key=lambda i: -s[0][i])[: int(side * side * retain)])
    sums = [0.0] * (rows * columns)
    for i in range(side * side):
        row = min(i // side // (side // rows), rows - 1)
        column = min(i % side // (side // columns), columns - 1)
        sums[row * columns + column] += s[0][i]
    weights = [math.exp((x - max(sums)) / tau) for x in sums]
    shares = [min(1, retain * (1 + w / sum(weights) - 1 / len(weights))) for w in weights]
    cells: list[list[tuple[int, int]]] = [[] for _ in sums]
    for y in range(height):
        for x in range(width):
            cells[(y + top) // side * columns + (x + left) // side].append((y, x))
    total = int(height * width * retain)
    wanted = [share * len(c) for share, c in zip(shares, cells, strict=True)]
    counts = [min(int(w), len(c)) for w, c in zip(wanted, cells, strict=True)]
    while sum(counts) < total:
        j = max((j for j in range(len(counts)) if counts[j] < len(cells[j])), key=lambda j: wanted[j] - counts[j])
        counts[j] += 1
    while sum(counts) > total:
        j = max((j for j in range(len(counts)) if counts[j]), key=lambda j: counts[j] - wanted[j])
        counts[j] -= 1

    def base_view_score(y: int, x: int) -> float:
        fy = min(max((y + 0.5) * side / height - 0.5, 0), side - 1)
        fx = min(max((x + 0.5) * side / width - 0.5, 0), side - 1)
        y0, x0 = int(fy), int(fx)
        y1, x1 = min(y0 + 1, side - 1), min(x0 + 1, side - 1)
        above = s[0][y0 * side + x0] * (1 - fx + x0) + s[0][y0 * side + x1] * (fx - x0)
        below = s[0][y1 * side + x0] * (1 - fx + x0) + s[0][y1 * side + x1] * (fx - x0)
        return above * (1 - fy + y0) + below * (fy - y0)

    for j, inside in enumerate(cells):
        crop_scores = [s[1 + j][(y + top) % side * side + (x + left) % side] for y, x in inside]
        base_scores = [base_view_score(y, x) for y, x in inside]
        norms = [math.sqrt(sum(v * v for v in vs)) or 1 for vs in (crop_scores, base_scores)]
        mixed = [a / norms[0] + b / norms[1] for a, b in zip(crop_scores, base_scores, strict=True)]
        for i in sorted(range(len(inside)), key=lambda i: -mixed[i])[: counts[j]]:
            y, x = inside[i]
            kept.add(side * side + y * (width + 1) + x)
    return kept | {side * side + y * (width + 1) + width for y in range(height)}


@settings(max_examples=60, deadline=None)
@given(sizes, st.sampled_from([0.1, 0.25, 0.5]), st.sampled_from([1.0, 10.0]), st.integers(0, 100))
def test_globalcom2_matches_naive_computation(size, retain: float, tau: float, seed: int) -> None:
    layout = layouts.anyres_layout(config(6), *size)
    features = make_features(layout, seed)
    assert features.scores is not None
    pruner = GlobalCom2(GlobalCom2Options(retain, tau))
    kept = pruner.select(layout, pruner.plan(layout), features)
    assert kept.tolist() == sorted(naive_globalcom2(layout, features.scores, retain, tau))


def test_crop_with_high_base_view_scores_keeps_more() -> None:
    layout = layouts.anyres_layout(config(6), 168, 168)
    scores = torch.zeros(5, 36)
    scores[0].view(6, 6)[3:, 3:] = 3.0
    pruner = GlobalCom2(GlobalCom2Options(0.25))
    counts = pruner.crop_token_counts(layout, pruner.plan(layout), scores)
    assert counts[3] == max(counts) > min(counts)
    assert sum(counts) == 36


def test_base_view_tokens_in_order_of_scores() -> None:
    layout = layouts.single_view(config(4), 1, 1)
    features = make_features(layout)
    pruner = GlobalCom2(GlobalCom2Options(0.5, base_view_order="score"))
    assert features.scores is not None
    assert (
        pruner.select(layout, pruner.plan(layout), features).tolist()
        == features.scores[0].argsort(descending=True)[:8].tolist()
    )


def naive_merge(tokens: torch.Tensor, count: int) -> dict[int, list[float]]:
    """Return the tokens that remain after one merging step, by index."""
    even, odd = range(0, len(tokens), 2), range(1, len(tokens), 2)
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    best = {i: max(odd, key=lambda j: float(unit[i] @ unit[j])) for i in even}
    merged = sorted(even, key=lambda i: -float(unit[i] @ unit[best[i]]))[:count]
    remaining = {i: tokens[i] for i in range(len(tokens)) if i not in merged}
    for j in odd:
        members = [tokens[i] for i in merged if best[i] == j]
        remaining[j] = torch.stack([tokens[j], *members]).mean(0)
    return {i: t.tolist() for i, t in remaining.items()}


@given(st.integers(2, 24), st.integers(1, 12), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_merging_matches_naive_computation(n: int, count: int, seed: int) -> None:
    tokens = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    count = min(count, n // 2)
    merged, indices = merge_step(tokens.float(), count, raster=True)
    naive = naive_merge(tokens, count)
    assert indices.tolist() == sorted(naive)
    expected = torch.tensor([naive[i] for i in sorted(naive)])
    torch.testing.assert_close(merged, expected.float(), atol=1e-5, rtol=1e-5)
    scrambled, scrambled_indices = merge_step(tokens.float(), count, raster=False)
    torch.testing.assert_close(scrambled[scrambled_indices.argsort()], merged)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([layouts.single_view, layouts.anyres_layout]),
    sizes,
    st.sampled_from([0.01, 0.02, 0.1, 0.25]),
    st.integers(0, 6),
)
def test_images_keep_at_least_one_token_and_at_most_the_largest(kind, size, retain, steps) -> None:
    """Test the bounds on kept tokens: the engine profiles its memory with the largest resolution of a model."""
    some = config(7, 4)
    layout = kind(some, *size)
    for pruner in (GlobalCom2(GlobalCom2Options(retain)), Diversity(DiversityOptions(retain)), AIM(AIMOptions(steps))):
        largest = max(pruner.plan(kind(some, *resolution)).num_tokens for resolution in some.image_grid_pinpoints)
        assert 0 < pruner.plan(layout).num_tokens <= largest
        long = [pruner.plan(layouts.video_layout(some, n)).num_tokens for n in (1, 10, 1000)]
        assert long == sorted(set(long)), "each frame adds tokens"


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-6, 1e6), st.integers(0, 50))
def test_crop_shares_are_finite_at_any_temperature(temperature: float, seed: int) -> None:
    layout = layouts.anyres_layout(config(6), 168, 100)
    features = make_features(layout, seed)
    assert features.scores is not None
    pruner = GlobalCom2(GlobalCom2Options(0.1, temperature))
    assert all(0 <= s <= 1 for s in pruner.crop_shares(layout, features.scores * 1e4))


def test_two_merge_steps_keep_a_quarter() -> None:
    assert merged_count(576, 2) == 144
    assert merged_count(576, 3) == 72
    assert merged_count(1, 2) == 1


def test_farthest_selection_matches_naive_greedy_selection() -> None:
    tokens = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(3))
    unit = functional.normalize(tokens, dim=-1)
    selected = [int((unit @ unit.mean(0)).argmin())]
    while len(selected) < 10:
        rest = [i for i in range(30) if i not in selected]
        selected.append(min(rest, key=lambda i: max(float(unit[i] @ unit[j]) for j in selected)))
    assert select_farthest(tokens, 10).tolist() == sorted(selected)


def test_random_projection_keeps_angles_and_is_deterministic() -> None:
    tokens = torch.randn(40, 1024, generator=torch.Generator().manual_seed(5)) + 0.5
    assert torch.equal(random_projection(tokens), random_projection(tokens))
    cosines = [
        functional.normalize(t, dim=-1) @ functional.normalize(t, dim=-1).T for t in (tokens, random_projection(tokens))
    ]
    assert float((cosines[0] - cosines[1]).abs().mean()) < 2 / PROJECTION_DIM**0.5
    assert torch.equal(random_projection(tokens[:, :PROJECTION_DIM]), tokens[:, :PROJECTION_DIM])


def test_determinantal_selection_matches_naive_greedy_selection() -> None:
    unit = functional.normalize(torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(4)).double(), dim=-1)
    similar, selected = unit @ unit.T, [int((unit @ unit.mean(0)).argmin())]
    for _ in range(5):
        rest = [i for i in range(20) if i not in selected]
        selected.append(max(rest, key=lambda i: float(torch.det(similar[[*selected, i]][:, [*selected, i]]))))
    assert select_determinantal(unit, 6).tolist() == sorted(selected)


def test_equal_tokens_are_selected_once_each() -> None:
    same = torch.ones(12, WIDTH)
    assert len(set(select_determinantal(same, 5).tolist())) == len(set(select_farthest(same, 5).tolist())) == 5


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.floats(0, 1), st.randoms())
def test_allocated_tokens_sum_up_to_the_total(sizes: list[int], part: float, random) -> None:
    total = int(part * sum(sizes))
    wanted = [random.uniform(0, n * 1.5) for n in sizes]
    counts = allocate_tokens(sizes, wanted, total)
    assert sum(counts) == total
    assert all(0 <= c <= n for c, n in zip(counts, sizes, strict=True))


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (GlobalCom2Options, {"retain": 0}),
        (GlobalCom2Options, {"retain": 1.1}),
        (GlobalCom2Options, {"temperature": 0.0}),
        (GlobalCom2Options, {"temperature": 5e-324}),
        (AIMOptions, {"temperature": 1e-310}),
        (DiversityOptions, {"retain": float("nan")}),
        (AIMOptions, {"merge_steps": -1}),
        (AIMOptions, {"experimental_layers": (5, 5)}),
        (AIMOptions, {"iterations": 0}),
    ],
)
def test_refuses_options_out_of_range(options, values) -> None:
    with pytest.raises(ValueError, match="expected"):
        options(**values)
