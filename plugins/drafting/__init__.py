"""What drafters and the engine's side of drafting share: the adjacency of tokens, and the budget of a step."""
