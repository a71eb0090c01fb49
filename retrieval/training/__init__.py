"""Training of encoders: the objectives of VDR and XTR over pairs of queries and documents."""
