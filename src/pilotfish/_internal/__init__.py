"""Internal utilities. Nothing in here imports other parts of Pilotfish."""
