"""The model, its step and everything that defines a run's numbers: read this first."""
