"""What retrieval plugins stand on: encoders, indexes, storage. Empty in this release."""
