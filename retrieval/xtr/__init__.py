"""XTR, contextualised token retrieval (arXiv 2304.01982): documents are ranked with the retrieved tokens alone."""
