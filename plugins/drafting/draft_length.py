"""How many drafted tokens are worth verifying: expected tokens per second over a cost measured as steps happen.

A step in which ``b`` requests have ``d`` drafted tokens verified takes ``T(b, d)`` seconds and yields, for each
request, one token and those of its drafts that are accepted. The best drafts, chains or trees, maximise

    (b + sum of the acceptance probabilities of the chosen tokens) / T(b, number of chosen tokens).

Scores fall along every path, so taking the likeliest tokens of the whole batch one by one never leaves a parent out,
and no tree of as many nodes has more accepted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contracts import Float32


@dataclass
class _Cell:
    """Steps of about the same shape: running means of requests and drafted tokens, running median of the duration."""

    requests: float
    drafted: float
    seconds: float
    weight: float
    last: int  # the step that was seen last


class StepCostModel:
    """Seconds of an engine step by its requests and its drafted tokens, learned from the steps themselves.

    Near any number of requests the cost is taken for a plane: a further request costs more than a further token of the
    same request. It is not one plane for all: a small batch waits for memory and verifies tokens almost for nothing, a
    large one computes and pays for each. How further tokens of a step grow dearer, or stay cheap up to a bound, a
    measurement at start may tell (`shape`); then the plane is over what it says, and over the number of tokens as well,
    for what that measurement leaves out: attention to the text before, sampling, choosing candidates.

    Durations are noisy and their outliers are long (other processes, page faults), so steps of like shape keep a
    running median, and the planes are fitted through the medians. They fade, as contexts grow and the machine's load
    changes.

    Args:
        slope: The cost of one drafted token relative to a whole step, believed until steps tell otherwise.
        memory: Steps after which an observation has lost 63 % of its weight.
    """

    MAX_CELLS = 256
    NEAR = 0.5  # octaves of the number of requests within which steps tell about each other

    def __init__(self, slope: float = 0.05, memory: float = 400.0) -> None:
        self._prior, self._memory = slope, memory
        self._cells: dict[tuple[int, int], _Cell] = {}
        self._coefficients: dict[int, tuple[float, float, float]] = {}
        self._rows, self._units = np.array([0.0, 1.0]), np.array([0.0, 1.0])
        # In squared units: how much evidence it takes to move the believed slope. A measured shape deserves more trust:
        # small drafts, whose units hardly differ, must not say that large ones are dear.
        self._trust = 20.0
        self._slack = 1e12  # in squared tokens, as much for what a measured shape leaves out: nothing, there is none
        self.steps = 0

    def set_latency_profile(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        """Take over how long steps of so many rows, ascending and beginning with 1, took; their proportions count.

        Times rise with rows: where noise says otherwise, the middle of what comes before and behind is taken.
        """
        taken = np.asarray(seconds, np.float64)
        times = (np.maximum.accumulate(taken) + np.minimum.accumulate(taken[::-1])[::-1]) / 2
        self._trust, self._slack = 1000.0, 100.0
        self._rows, self._units = np.asarray(rows, np.float64), (times / times[0] - 1) / self._prior
        self._coefficients.clear()

    def units(self, requests: "float | np.ndarray", drafted: "float | np.ndarray") -> "float | np.ndarray":
        """What drafted tokens cost, in tokens of the believed slope; without a measured shape, their number."""
        return self._at(requests + drafted) - self._at(requests)  # type: ignore[operator]

    def _at(self, rows: "float | np.ndarray") -> "float | np.ndarray":
        """Units of a step, continued in a line behind the last that was measured."""
        (x0, x1), (u0, u1) = self._rows[-2:], self._units[-2:]
        beyond = np.maximum(np.asarray(rows) - x1, 0) * (u1 - u0) / (x1 - x0)
        return np.interp(rows, self._rows, self._units) + beyond

    def __call__(self, requests: int, drafted: "int | np.ndarray") -> "float | np.ndarray":
        """Estimated seconds of a step."""
        without, per_unit, per_token = self.coefficients(requests)
        return without + per_unit * self.units(requests, drafted) + per_token * drafted

    def coefficients(self, requests: int) -> tuple[float, float, float]:
        """Seconds of a step of ``requests`` without drafts, of each unit, and of each drafted token beside its units.

        Without a measured shape units are tokens, and the last is 0.
        """
        if not self._cells:  # only their proportion matters
            return 1.0, self._prior, 0.0
        if requests not in self._coefficients:
            self._coefficients[requests] = self._fit(requests)
        return self._coefficients[requests]

    def observe(self, requests: int, drafted: int, seconds: float) -> None:
        """Take in one step that verified drafts and did nothing else (no prompt)."""
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
            # A step towards the sample, bounded whatever its distance, settles at the median.
            bound = cell.seconds * max(0.02, min(0.3, share))
            cell.seconds += min(max(seconds - cell.seconds, -bound), bound)
            cell.last = self.steps
        if self.steps % 8 == 0 or self.steps < 8:
            self._coefficients.clear()

    def _fade(self, cell: _Cell) -> float:
        return float(np.exp((cell.last - self.steps) / self._memory))

    def _fit(self, requests: int) -> tuple[float, float, float]:
        """Weighted ridge regression through the medians near ``requests``, drawn towards the believed slope."""
        cells = list(self._cells.values())
        x = np.array([[c.requests, c.drafted, c.drafted] for c in cells])
        x[:, 1] = self.units(x[:, 0], x[:, 1])
        y = np.array([c.seconds for c in cells])
        distance = np.log2(x[:, 0] / requests) / self.NEAR
        distance -= np.abs(distance).min() * np.sign(distance)  # the nearest cells count whole, however far
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


def _solve_nonnegative(gram: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """What solves a normal equation with no coefficient below 0: those that would be leave, the others take over."""
    found, used = np.zeros(len(target)), np.ones(len(target), np.bool_)
    while used.any():
        found[:] = 0.0
        found[used] = np.linalg.solve(gram[np.ix_(used, used)], target[used])
        if found.min() >= 0.0:
            break
        used[found.argmin()] = False
    return np.maximum(found, 0.0)


class AcceptanceRecord:
    """How one request's drafts fare beside their scores, which are rates over all requests.

    One answer follows its sources closely, another hardly; what was accepted of the first drafts tells about the next.
    Expected and accepted tokens are counted with a fading memory, from a prior of as many of both. Steps without a
    draft fade as well, so that a request that was believed too little for any draft is tried again.
    """

    PRIOR = 2.0  # tokens
    MEMORY = 0.95  # what a step leaves of the count
    LOW = 0.25  # a request is never given up: its text may turn

    def __init__(self) -> None:
        self._expected = self._accepted = 0.0

    def observe(self, scores: Float32, accepted: int) -> None:
        """Take in one step.

        Args:
            scores: Of all that was verified, [n], perhaps nothing; their sum was expected to be accepted.
            accepted: Tokens that were.
        """
        self._expected = self.MEMORY * self._expected + float(scores.sum())
        self._accepted = self.MEMORY * self._accepted + accepted

    @property
    def factor(self) -> float:
        """What the next scores are worth, at most 1."""
        return min(1.0, max(self.LOW, (self.PRIOR + self._accepted) / (self.PRIOR + self._expected)))


def _size_class(count: int) -> int:
    """A count with its three leading bits: exact up to 7, then within a quarter."""
    shift = max(0, count.bit_length() - 3)
    return count >> shift << shift


def allocate_draft_tokens(scores: Sequence[Float32], cost: Callable[[int, Any], Any]) -> list[int]:
    """How many leading tokens of each request's draft to verify.

    Args:
        scores: For each request of the step the acceptance probabilities along its draft, [n_i], falling.
        cost: Of a step, by requests and drafted tokens, as `StepCost`.

    Returns:
        The number of tokens to keep for each request, 0 .. n_i.
    """
    if not scores:
        return []
    owners = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
    flat = np.concatenate([np.asarray(s, np.float64) for s in scores])
    order = np.argsort(-flat, kind="stable")  # stable: equal scores keep parents before children
    yields = len(scores) + np.concatenate(([0.0], np.cumsum(flat[order])))
    chosen = int(np.argmax(yields / cost(len(scores), np.arange(len(flat) + 1))))
    return np.bincount(owners[order[:chosen]], minlength=len(scores)).tolist()
