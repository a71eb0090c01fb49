"""Defaults that commands show in their help, without the imports of the modules that use them."""

CHUNK_TOKENS, OVERLAP = 200, 40  # chunks of texts, in tokens
LOCK_TIMEOUT = 30.0  # seconds that a change of an index waits for a change of another process
