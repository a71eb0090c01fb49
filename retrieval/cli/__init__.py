"""Commands for document indexes and encoders: `pilotfish index` and `pilotfish train`."""
