"""`pilotfish tune`: profiles of KV policies for a model."""
