"""Choice of one number of draft tokens for all requests of a step, as vLLM's asynchronous scheduling needs it.

The number is chosen before the drafts are known, so it follows from the steps before: it maximises the expected number
of tokens per second, with the cost of a step of `StepCostModel` and the mean number of accepted tokens of recent steps.
A number that has not been used lately is estimated from the others. From time to time one of these is probed: used for
a few steps, if it is not expected to be slow.
"""

from collections.abc import Sequence

import numpy as np

from .draft_length import StepCostModel

PROBE_INTERVAL, PROBE_STEPS = 256, 4  # steps from one probe to the next, and steps of a probe
MIN_PROBE_RATE = 0.5  # least expected rate of a probed number, relative to the best number's
MIN_GAIN = 0.02  # over steps without draft tokens
OUTLIER = 4.0  # a duration is taken for at most this many times the expected one: kernels may be compiled in the step
DECAY = 0.98  # of the counts, per step
PRIOR = 0.5  # acceptance rate of a draft token after those before it, until one was verified
FULL_WEIGHT = 8.0  # requests counted for a number from which its mean is not mixed with an estimate


class BatchDraftLength:
    """The number of draft tokens of each request, by the number of requests: ``lengths[num_requests]``.

    It takes the place of vLLM's table ``dynamic_sd_lookup``, which is read once for each step.

    Args:
        schedule: The number of draft tokens at first, by the number of requests; element 0 is not used. Its values are
            those to choose from, and 0.
        cost: Cost model of a step.
        memory_bound_tokens: Number of tokens up to which a step is assumed to take the time of one token, until steps
            have been observed.
        max_tokens: Largest number of tokens of a step with draft tokens.

    Attributes:
        cost: The cost model.
    """

    def __init__(self, schedule: Sequence[int], cost: StepCostModel, memory_bound_tokens: int, max_tokens: int) -> None:
        self._schedule, self.cost, self._max_tokens = list(schedule), cost, max_tokens
        self.choices = sorted({0, *self._schedule[1:]})
        m = memory_bound_tokens
        cost.set_latency_profile([1, m, 4 * m], [1.0, 1.02, 4.02])
        self._weight, self._accepted = np.zeros((2, len(self.choices)))  # decayed counts of requests, and of tokens
        self._last_used = np.zeros(len(self.choices), np.int64)  # step of the last use
        self._expected: np.ndarray | None = None  # see `expected_accepted`; None after an observation
        self._steps = 0
        self._probe: tuple[int, int] | None = None  # choice, and steps left

    def __len__(self) -> int:
        """Return the largest number of requests, plus one."""
        return len(self._schedule)

    def __getitem__(self, num_requests: int) -> int:
        """Return the number of draft tokens of each request for the next step of ``num_requests`` requests."""
        rates = self.rates(num_requests)
        if self._probe is not None:
            i, left = self._probe
            self._probe = (i, left - 1) if left > 1 else None
            if rates[i] >= MIN_PROBE_RATE * rates.max():  # the number of requests may have changed
                return self.choices[i]
        if not self._weight[1:].any():  # nothing is known yet
            return self._schedule[num_requests]
        best = int(np.argmax(rates))
        if rates[best] < (1 + MIN_GAIN) * rates[0]:
            best = 0
        return self.choices[best]

    def rates(self, num_requests: int) -> np.ndarray:
        """Return the expected number of tokens per second for each choice; 0 for steps of too many tokens."""
        lengths = np.array(self.choices)
        seconds = np.asarray(self.cost(num_requests, num_requests * lengths), np.float64)
        rates = num_requests * (1 + self.expected_accepted()) / seconds
        return np.where((lengths == 0) | (num_requests * (1 + lengths) <= self._max_tokens), rates, 0.0)

    def expected_accepted(self) -> np.ndarray:
        """Return the expected number of accepted tokens of a request for each choice."""
        if self._expected is None:
            self._expected = self._estimate_accepted()
        return self._expected

    def _estimate_accepted(self) -> np.ndarray:
        lengths = np.array(self.choices, np.float64)
        known = np.flatnonzero(self._weight > 0)
        mean = np.divide(self._accepted, self._weight, out=np.zeros(len(lengths)), where=self._weight > 0)
        result = np.zeros(len(lengths))
        for i, length in enumerate(lengths):
            if not length:
                continue
            others = known[(known != i) & (lengths[known] > 0)]
            estimate = _chain_sum(PRIOR, float(length))
            if len(others):
                nearest = others[np.argmin(np.abs(np.log(lengths[others] / length)))]
                estimate = _extrapolate(float(mean[nearest]), float(lengths[nearest]), float(length))
            share = min(self._weight[i] / FULL_WEIGHT, 1.0)
            result[i] = share * mean[i] + (1 - share) * estimate
        return result

    def observe(self, num_requests: int, length: int, accepted: int, seconds: float | None) -> None:
        """Record a decode step.

        Args:
            num_requests: Number of requests.
            length: Number of draft tokens of each.
            accepted: Number of accepted draft tokens of all requests together.
            seconds: Duration of the step; None if it is not known.
        """
        self._steps += 1
        if seconds is not None:
            if self.cost.steps:
                seconds = min(seconds, OUTLIER * float(self.cost(num_requests, num_requests * length)))
            self.cost.observe(num_requests, num_requests * length, seconds)
        if length in self.choices:
            i = self.choices.index(length)
            self._expected = None
            self._weight *= DECAY
            self._accepted *= DECAY
            self._weight[i] += num_requests
            self._accepted[i] += accepted
            self._last_used[i] = self._steps
        if self._steps % PROBE_INTERVAL == 0:
            self._start_probe(num_requests)

    def _start_probe(self, num_requests: int) -> None:
        """Begin to probe the choice that was not used for longest, among those that are not expected to be slow."""
        rates = self.rates(num_requests)
        fast = [
            i
            for i in range(len(rates))
            if rates[i] >= MIN_PROBE_RATE * rates.max() and self._last_used[i] < self._steps
        ]
        self._probe = (min(fast, key=lambda i: self._last_used[i]), PROBE_STEPS) if fast else None


def _extrapolate(accepted: float, length: float, to: float) -> float:
    """Return the expected number of accepted tokens of ``to`` draft tokens, given that of ``length``.

    Each token is assumed to be accepted with the same probability after those before it, as in a chain.
    """
    low, high = 0.0, 1.0
    for _ in range(30):  # accepted = p + p**2 + .. + p**length increases with p
        p = (low + high) / 2
        low, high = (p, high) if _chain_sum(p, length) < accepted else (low, p)
    return _chain_sum(low, to)


def _chain_sum(p: float, length: float) -> float:
    return length * p if p > 1 - 1e-9 else p * (1 - p**length) / (1 - p)
