"""Training of encoders: the papers' objectives over pairs of queries and documents."""
