"""XTR, contextualised token retrieval (arXiv 2304.01982): documents are scored with their retrieved tokens only."""
