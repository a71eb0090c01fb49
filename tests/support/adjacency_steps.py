"""Steps of an engine for tests of the adjacency tables on a device, which learn as those on the host."""

from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pilotfish.plugins.contracts import ROOT, DeviceBatch
from pilotfish.plugins.drafting import adjacency
from pilotfish.plugins.drafting.tree import node_depths

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, K, ORDER, BITS = 20, 3, 3, 5  # few hashed rows, so that contexts collide
SLOTS, LENGTH = 4, 64
fast = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same(device: Any, host: tuple[Any, Any], table: int = 0) -> None:
    """The tokens, their confidence and the owners of all rows are the same, and so are the acceptance rates."""
    rows, rates = device.to_host(table)
    np.testing.assert_array_equal(rows.tokens, host[0].tokens)
    held = rows.tokens >= 0
    np.testing.assert_array_equal(rows.confidence[held], host[0].confidence[held])
    np.testing.assert_array_equal(rows.keys, host[0].keys)
    for ours, theirs in zip(rates, host[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


class Step:
    """A verified step of some requests, for both implementations."""

    def __init__(self, texts: list[list[int]], drafts: list[list[int]], sampled: list[list[int]], seed: int) -> None:
        """Begin with the texts before the step; ``sampled`` holds the tokens that the step appends to each."""
        random = np.random.default_rng(seed)
        self.texts, self.sampled = texts, sampled
        self.inputs = [[text[-1], *draft] for text, draft in zip(texts, drafts, strict=True)]
        sizes = [len(i) for i in self.inputs]
        self.starts = np.cumsum([0, *sizes])
        n = int(self.starts[-1])
        self.ids = np.stack([random.permutation(VOCAB)[:K] for _ in range(n)]).astype(np.int64)
        self.probs = -np.sort(-random.dirichlet(np.ones(K), n).astype(np.float32), axis=1)

    def on_host(self, tables: list[tuple[Any, Any]], order: int = ORDER) -> None:
        # The device learns from all requests at once, and the host from one after the other.
        for (rows, rates), text, tokens in zip(tables, self.texts, self.sampled, strict=True):
            if tokens:
                adjacency.update_acceptance_rates(rows, rates, order, as_ids(text), as_ids(tokens))
        for i, (rows, _) in enumerate(tables):
            inputs = self.inputs[i]
            part = slice(self.starts[i], self.starts[i + 1])
            accepted = np.arange(len(inputs)) < max(len(self.sampled[i]), 1)
            parents = np.arange(ROOT, len(inputs) - 1, dtype=np.int32)
            context = as_ids(self.texts[i][:-1])
            arguments = as_ids(inputs), parents, accepted, self.ids[part].astype(np.int32), self.probs[part]
            adjacency.update_rows(rows, order, context, *arguments)

    def on_device(self, slots: list[int], width: int) -> DeviceBatch:
        texts, lengths = torch.zeros(SLOTS, LENGTH, dtype=torch.int32), torch.zeros(SLOTS, dtype=torch.int32)
        positions = []
        for slot, text, tokens, inputs in zip(slots, self.texts, self.sampled, self.inputs, strict=True):
            whole = [*text, *tokens]
            texts[slot, : len(whole)] = torch.tensor(whole)
            lengths[slot] = len(whole)
            positions += range(len(text) - 1, len(text) - 1 + len(inputs))
        tensors: dict[str, torch.Tensor] = {
            "idx_mapping": torch.tensor(slots),
            "all_token_ids": texts,
            "total_len": lengths,
            "num_sampled": torch.tensor([len(s) for s in self.sampled], dtype=torch.int32),
            "cu_num_logits": torch.tensor(self.starts, dtype=torch.int32),
            "input_ids": torch.tensor([t for i in self.inputs for t in i], dtype=torch.int32),
            "positions": torch.tensor(positions),
            "candidate_ids": torch.from_numpy(self.ids),
            "candidate_probs": torch.from_numpy(self.probs),
        }
        return DeviceBatch(len(slots), width, **{name: t.to(DEVICE) for name, t in tensors.items()})


def as_ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


tokens = st.integers(0, VOCAB - 1)
few = st.integers(0, 3)  # so that rows and contexts repeat


@st.composite
def steps(draw: st.DrawFn) -> Step:
    count = draw(st.integers(1, 3))
    texts = [draw(st.lists(few, min_size=1, max_size=12)) for _ in range(count)]
    drafts = [draw(st.lists(few, max_size=4)) for _ in range(count)]
    sampled = []
    for draft in drafts:
        right = draw(st.integers(0, len(draft)))
        sampled.append(draw(st.sampled_from([[*draft[:right], draw(tokens)], []])))
    return Step(texts, drafts, sampled, draw(st.integers(0, 1 << 30)))


class TreeStep(Step):
    """A verified step of some requests whose draft tokens form trees."""

    def __init__(
        self, texts: list[list[int]], trees: list[tuple[list[int], list[int]]], sampled: list[list[int]], seed: int
    ) -> None:
        """Begin with the texts before the step, and for each request the tokens and parents of its tree."""
        super().__init__(texts, [tokens for tokens, _ in trees], sampled, seed)
        self.parents = [np.array(parents, np.int32) for _, parents in trees]

    def accepted(self, i: int) -> np.ndarray:
        """Return which positions of a request lie on the path of its sampled tokens."""
        accepted, node = np.zeros(len(self.inputs[i]), bool), ROOT
        accepted[0] = True
        for token in self.sampled[i]:
            fits = [
                n
                for n, p in enumerate(self.parents[i].tolist())
                if p == node and self.inputs[i][n + 1] == token and not accepted[n + 1]
            ]
            if not fits:
                break
            node = fits[0]
            accepted[node + 1] = True
        return accepted

    def on_host(self, tables: list[tuple[Any, Any]], order: int = ORDER) -> None:
        for (rows, rates), text, tokens in zip(tables, self.texts, self.sampled, strict=True):
            if tokens:
                adjacency.update_acceptance_rates(rows, rates, order, as_ids(text), as_ids(tokens))
        for i, (rows, _) in enumerate(tables):
            part = slice(self.starts[i], self.starts[i + 1])
            parents = np.append(np.int32(ROOT), self.parents[i] + 1).astype(np.int32)
            arguments = as_ids(self.inputs[i]), parents, self.accepted(i), self.ids[part].astype(np.int32)
            adjacency.update_rows(rows, order, as_ids(self.texts[i][:-1]), *arguments, self.probs[part])

    def on_device(self, slots: list[int], width: int) -> DeviceBatch:
        batch = super().on_device(slots, width)
        positions = [
            len(text) - 1 + depth
            for text, parents in zip(self.texts, self.parents, strict=True)
            for depth in (0, *node_depths(parents))
        ]
        parents = np.concatenate([np.append(ROOT, p + 1) for p in self.parents])
        accepted = np.concatenate([self.accepted(i) for i in range(len(self.texts))])
        return DeviceBatch(
            **{
                **vars(batch),
                "positions": torch.tensor(positions, device=DEVICE),
                "parents": torch.from_numpy(parents.astype(np.int32)).to(DEVICE),
                "accepted": torch.from_numpy(accepted).to(DEVICE),
                "chain_only": torch.zeros(SLOTS, dtype=torch.bool, device=DEVICE),
            }
        )


@st.composite
def tree_steps(draw: st.DrawFn) -> TreeStep:
    texts, trees, sampled = [], [], []
    for _ in range(draw(st.integers(1, 2))):
        texts.append(draw(st.lists(few, min_size=1, max_size=8)))
        size = draw(st.integers(0, 5))
        trees.append(([draw(few) for _ in range(size)], [draw(st.integers(ROOT, i - 1)) for i in range(size)]))
        sampled.append(draw(st.lists(few, max_size=4)))
    return TreeStep(texts, trees, sampled, draw(st.integers(0, 1 << 30)))
