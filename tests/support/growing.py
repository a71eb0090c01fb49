"""Requests that grow chunk by chunk in a KV cache with separate blocks per head, for tests of all kernels."""

import numpy as np
import torch

from pilotfish.kvcache.kernels.head_cache import CPUHeadCaches, WindowedStep, means_bytes
from pilotfish.plugins.razor_attention import RazorAttention

TOLERANCE = {torch.float32: 3e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}


class Text:
    """Requests that grow chunk by chunk in a layer with separate KV blocks per head, computed by the CPU kernels."""

    device = "cpu"

    def make_caches(self, caches, windowed, window):
        """Return the KV caches of the layer."""
        return CPUHeadCaches(caches, windowed, window)

    def make_step(self, begins, ends, prompt_len):
        """Return the metadata of a step for the kernels; the first ``prompt_len`` tokens are those of the prompt."""
        heads = len(self.windowed) * self.share
        return WindowedStep(begins, ends, lambda _, n: self.window.num_evicted(n, self.block, n < prompt_len), heads)

    def __init__(self, lengths, windowed, share, size, block, dtype, window, seed) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.window, self.block, self.size, self.share, self.dtype = window, block, size, share, dtype
        self.windowed, self.lengths = windowed, lengths
        blocks = [-(-n // block) + 1 for n in lengths]
        page = block * 2 * size + means_bytes(size) // torch.empty(0, dtype=dtype).element_size()
        memory = torch.full((len(windowed), sum(blocks) + 1, page), float("nan"), dtype=dtype, device=self.device)
        strides = (page, block * 2 * size, 2 * size, 1)
        shape = (sum(blocks) + 1, 1, block, 2 * size)
        self.caches = self.make_caches([m.as_strided(shape, strides) for m in memory.unbind()], windowed, window)
        self.memory = memory
        self.tables = []
        for _ in windowed:
            order, table = torch.randperm(sum(blocks), generator=self.rng), torch.zeros(len(lengths), max(blocks))
            used = 0
            for r, n in enumerate(blocks):
                table[r, :n] = order[used : used + n] + 1
                used += n
            self.tables.append(table.int().to(self.device))
        heads = len(windowed)
        self.keys, self.values = (
            [(torch.randn(n, heads, size, generator=self.rng) + 0.3).to(dtype) for n in lengths] for _ in range(2)
        )

    def step(self, begins, ends, prompt_len=0):
        """Process positions of every request, and return the queries and the outputs of each request."""
        key = torch.cat([k[b:e] for k, b, e in zip(self.keys, begins, ends, strict=True)])
        value = torch.cat([v[b:e] for v, b, e in zip(self.values, begins, ends, strict=True)])
        slots = []
        for table in (t.cpu() for t in self.tables):
            positions = [torch.arange(b, e) for b, e in zip(begins, ends, strict=True)]
            slots.append(
                torch.cat(
                    [
                        t[p // self.block].long() * self.block + p % self.block
                        for t, p in zip(table, positions, strict=True)
                    ]
                ).to(self.device)
            )
        step = self.make_step(begins, ends, prompt_len)
        shape = len(key), len(self.windowed) * self.share, self.size
        query = torch.randn(shape, generator=self.rng).to(self.dtype).to(self.device)
        output = torch.full_like(query, 7.0)
        self.caches.bind(self.tables, slots)
        self.caches.store_kv(key.to(self.device), value.to(self.device))
        self.caches.update_means(step)
        self.caches.attend(query, self.size**-0.5, output, step)
        lengths = [e - b for b, e in zip(begins, ends, strict=True)]
        return query.cpu().split(lengths), output.cpu().split(lengths)

    def check(self, begins, ends, prompt_len=0) -> None:
        """Process positions, and compare the first, the last and some others of every request with `expected`."""
        query, output = self.step(begins, ends, prompt_len)
        for r, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            for n in {*range(begin, end, 37), *range(begin, end)[-1:]}:
                gap = self.window.num_evicted(n, self.block, n < prompt_len)
                np.testing.assert_allclose(
                    output[r][n - begin].double().numpy(),
                    self.expected(query[r][n - begin], r, n + 1, gap),
                    atol=TOLERANCE[self.dtype],
                )

    def grow(self, chunk) -> None:
        """Process all tokens but two chunk by chunk, then decode two, and check every step.

        Only the first ``prompt_len`` tokens (three quarters of the shortest request) count as prompt; the other
        prefilled tokens are output, as after a preemption.
        """
        done = [0] * len(self.lengths)
        prompts = [n - 2 for n in self.lengths]
        prompt_len = min(prompts) * 3 // 4
        while done != prompts:
            ends = [min(d + chunk, n) for d, n in zip(done, prompts, strict=True)]
            self.check(done, ends, prompt_len)
            done = ends
        for ends in ([n - 1 for n in self.lengths], self.lengths):
            self.check(done, ends)
            done = ends

    def expected(self, query, r, end, gap):
        """Return the expected output, [query_heads, head_size], of a token of request ``r`` with ``end`` positions."""
        sinks = self.caches.sink_blocks * self.block
        parts = []
        for h, leaves_out in enumerate(self.windowed):
            left_out = (sinks, sinks + gap) if leaves_out else (0, 0)
            q = query[h * self.share : (h + 1) * self.share].double().numpy()
            k, v = (x[r][:end, h].double().numpy() for x in (self.keys, self.values))
            parts.append(
                RazorAttention.windowed_attention(q, k, v, self.size**-0.5, left_out, self.window.compensation)
            )
        return np.concatenate(parts)
