"""Choice of the number of draft tokens to verify: it maximises the expected number of tokens per second.

A step that verifies ``d`` draft tokens of ``b`` requests takes ``T(b, d)`` seconds. It yields one token for each
request, and the accepted draft tokens. The best drafts, chains or trees, maximise

    (b + sum of the acceptance probabilities of the selected tokens) / T(b, number of selected tokens).

Scores decrease along every path. So selecting the most probable tokens of the whole batch one after the other never
selects a node without its parent, and no other trees with as many nodes have a larger expected number of accepted
tokens. `StepCostModel` learns T from the duration of steps.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contracts import Float32


@dataclass
class _Cell:
    """Steps of similar size.

    Attributes:
        requests: Running mean of the number of requests.
        drafted: Running mean of the number of draft tokens.
        seconds: Running median of the duration.
        weight: Weight of the observations.
        last: Index of the last observed step.
    """

    requests: float
    drafted: float
    seconds: float
    weight: float
    last: int


class StepCostModel:
    """Cost model of an engine step: its duration by the number of requests and draft tokens, learned from steps.

    Near each number of requests, the cost is modelled as a plane, since another request costs more than another token
    of the same request. There is no common plane for all batch sizes: a small batch is limited by memory bandwidth and
    verifies tokens at almost no cost, while a large batch is limited by compute.

    A latency profile measured at start (`set_latency_profile`) may describe how the cost grows with the number of
    tokens. The plane is then a function of the profile's cost, and also of the number of tokens, for costs that are not
    in the profile: attention over the context, sampling, and the selection of candidates.

    Durations are noisy, and outliers are long (other processes, page faults). So steps of similar size share a running
    median, and the planes are fitted to the medians. Old observations lose weight, since contexts grow and the load of
    the machine changes.

    Args:
        slope: Prior cost of one draft token, relative to a step without drafts.
        memory: Number of steps after which an observation has lost 63 % of its weight.
    """

    MAX_CELLS = 256
    NEAR = 0.5  # bandwidth of the fit, in octaves of the number of requests

    def __init__(self, slope: float = 0.05, memory: float = 400.0) -> None:
        self._prior, self._memory = slope, memory
        self._cells: dict[tuple[int, int], _Cell] = {}
        self._coefficients: dict[int, tuple[float, float, float]] = {}
        self._rows, self._units = np.array([0.0, 1.0]), np.array([0.0, 1.0])
        # Regularisation of the prior slope, in squared units. A latency profile gets more, since small drafts, whose
        # units hardly differ, must not decide the cost of large ones.
        self._trust = 20.0
        self._slack = 1e12  # the same for costs outside the latency profile, in squared tokens; none without a profile
        self.steps = 0

    def set_latency_profile(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        """Set the latency profile, of which only the proportions matter.

        Args:
            rows: Batch sizes in query tokens, ascending, from 1 on.
            seconds: Duration of a step of each batch size.
        """
        times = smooth_step_times(seconds)
        self._trust, self._slack = 1000.0, 100.0
        self._rows, self._units = np.asarray(rows, np.float64), (times / times[0] - 1) / self._prior
        self._coefficients.clear()

    def units(self, requests: "float | np.ndarray", drafted: "float | np.ndarray") -> "float | np.ndarray":
        """Return the cost of draft tokens, in tokens of the prior slope; without a latency profile, their number."""
        return self._at(requests + drafted) - self._at(requests)  # type: ignore[operator]

    def _at(self, rows: "float | np.ndarray") -> "float | np.ndarray":
        """Return the units of a step of ``rows`` query tokens, extrapolated linearly beyond the latency profile."""
        (x0, x1), (u0, u1) = self._rows[-2:], self._units[-2:]
        beyond = np.maximum(np.asarray(rows) - x1, 0) * (u1 - u0) / (x1 - x0)
        return np.interp(rows, self._rows, self._units) + beyond

    def __call__(self, requests: int, drafted: "int | np.ndarray") -> "float | np.ndarray":
        """Return the estimated duration of a step, in seconds."""
        without, per_unit, per_token = self.coefficients(requests)
        return without + per_unit * self.units(requests, drafted) + per_token * drafted

    def coefficients(self, requests: int) -> tuple[float, float, float]:
        """Return the coefficients of the plane for a number of requests.

        Returns:
            The duration of a step without drafts, and the additional duration per unit and per draft token, in seconds.
            Without a latency profile, units are tokens and the last coefficient is 0.
        """
        if not self._cells:  # only the proportions of the coefficients matter
            return 1.0, self._prior, 0.0
        if requests not in self._coefficients:
            self._coefficients[requests] = self._fit(requests)
        return self._coefficients[requests]

    def observe(self, requests: int, drafted: int, seconds: float) -> None:
        """Record the duration of a decode step, which may verify drafts but processes no prompt."""
        if requests < 1 or drafted < 0 or seconds <= 0:
            return
        self.steps += 1
        key = _size_class(requests), _size_class(drafted)
        cell = self._cells.get(key)
        if cell is None:
            if len(self._cells) >= self.MAX_CELLS:
                del self._cells[min(self._cells, key=lambda k: self._cells[k].last)]
            self._cells[key] = _Cell(requests, drafted, seconds, 1.0, self.steps)
        else:
            cell.weight = 1.0 + cell.weight * self._fade(cell)
            share = 1.0 / cell.weight
            cell.requests += share * (requests - cell.requests)
            cell.drafted += share * (drafted - cell.drafted)
            # Steps of bounded size towards the sample converge to the median.
            bound = cell.seconds * max(0.02, min(0.3, share))
            cell.seconds += min(max(seconds - cell.seconds, -bound), bound)
            cell.last = self.steps
        if self.steps % 8 == 0 or self.steps < 8:
            self._coefficients.clear()

    def _fade(self, cell: _Cell) -> float:
        return float(np.exp((cell.last - self.steps) / self._memory))

    def _fit(self, requests: int) -> tuple[float, float, float]:
        """Fit a weighted ridge regression to the medians near ``requests``, regularised towards the prior slope."""
        cells = list(self._cells.values())
        x = np.array([[c.requests, c.drafted, c.drafted] for c in cells])
        x[:, 1] = self.units(x[:, 0], x[:, 1])
        y = np.array([c.seconds for c in cells])
        distance = np.log2(x[:, 0] / requests) / self.NEAR
        distance -= np.abs(distance).min() * np.sign(distance)  # the nearest cells have full weight at any distance
        w = np.array([min(c.weight * self._fade(c), 50.0) for c in cells]) * np.exp(-0.5 * distance**2)
        mean_x, mean_y = np.average(x, axis=0, weights=w), float(np.average(y, weights=w))
        believed = np.array([0.0, mean_y * self._prior / (1.0 + self._prior * mean_x[1]), 0.0])
        strength = np.array([1.0, self._trust, self._slack])
        centred = x - mean_x
        gram = (centred * w[:, None]).T @ centred + np.diag(strength)
        target = (centred * w[:, None]).T @ (y - mean_y) + strength * believed
        slopes = _solve_nonnegative(gram, target)
        without = mean_y + float(slopes @ ([requests, 0.0, 0.0] - mean_x))
        return max(without, 1e-3 * mean_y), float(slopes[1]), float(slopes[2])


def smooth_step_times(seconds: Sequence[float]) -> NDArray[np.float64]:
    """Return step times that increase with the batch size.

    Where measured times do not, because of noise or of a slower kernel for single tokens, the mean of the running
    maximum and of the reversed running minimum is used.
    """
    taken = np.asarray(seconds, np.float64)
    return (np.maximum.accumulate(taken) + np.minimum.accumulate(taken[::-1])[::-1]) / 2


def _solve_nonnegative(gram: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve a normal equation with non-negative coefficients, exactly.

    The best solution is the unconstrained one over its positive coefficients, so with few coefficients all sets of them
    can be tried.
    """
    solution = np.linalg.solve(gram, target)
    if solution.min() >= 0.0:
        return np.asarray(solution, np.float64)
    best, lowest = np.zeros(len(target)), 0.0
    for count in range(1, len(target)):
        for positive in map(list, itertools.combinations(range(len(target)), count)):
            solution = np.zeros(len(target))
            solution[positive] = np.linalg.solve(gram[np.ix_(positive, positive)], target[positive])
            loss = float(solution @ gram @ solution - 2 * solution @ target)
            if solution.min() >= 0.0 and loss < lowest:
                best, lowest = solution, loss
    return best


class AcceptanceRecord:
    """The acceptance rate of one request's drafts, relative to their scores, which are rates over all requests.

    Some answers follow their sources closely, others hardly, so the acceptance of earlier drafts predicts that of later
    ones. Expected and accepted tokens are counted with exponential decay, from a prior with equal counts of both.
    Counts decay in steps without a draft too, so that a request whose factor was too low for a draft gets drafts again.
    """

    PRIOR = 2.0  # tokens
    MEMORY = 0.95  # decay of the counts per step
    LOW = 0.25  # smallest factor: later text of a request may be easier to predict

    def __init__(self) -> None:
        self._expected = self._accepted = 0.0

    def observe(self, scores: Float32, accepted: int) -> None:
        """Record one step.

        Args:
            scores: [n] scores of the verified draft tokens; their sum is the expected number of accepted tokens.
            accepted: Number of accepted draft tokens.
        """
        self._expected = self.MEMORY * self._expected + float(scores.sum())
        self._accepted = self.MEMORY * self._accepted + accepted

    @property
    def factor(self) -> float:
        """Factor for the scores of the next draft, at most 1."""
        return min(1.0, max(self.LOW, (self.PRIOR + self._accepted) / (self.PRIOR + self._expected)))


def _size_class(count: int) -> int:
    """Return a count rounded down to its three leading bits: exact up to 7, then within a quarter."""
    shift = max(0, count.bit_length() - 3)
    return count >> shift << shift


def allocate_draft_tokens(
    scores: Sequence[Float32], cost: Callable[[int, Any], Any], most: int | None = None
) -> list[int]:
    """Return how many leading tokens of each request's draft to verify.

    Args:
        scores: For each request of the step, the acceptance probabilities of its draft tokens, [n_i], descending.
        cost: Function that returns the duration of a step by the number of requests and draft tokens, such as
            `StepCostModel`.
        most: Largest number of draft tokens of all requests together; None for no limit.

    Returns:
        The number of tokens to verify for each request, 0 .. n_i.
    """
    if not scores:
        return []
    owners = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
    flat = np.concatenate([np.asarray(s, np.float64) for s in scores])
    order = np.argsort(-flat, kind="stable")[:most]  # stable: equal scores keep parents before children
    yields = len(scores) + np.concatenate(([0.0], np.cumsum(flat[order])))
    num_selected = int(np.argmax(yields / cost(len(scores), np.arange(len(order) + 1))))
    return np.bincount(owners[order[:num_selected]], minlength=len(scores)).tolist()
