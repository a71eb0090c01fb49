"""What KV policies stand on: which positions are read, and the kernels that choose and read them."""
