"""What KV policies stand on: head profiles, selection, cache layout, kernels. Empty in this release."""
