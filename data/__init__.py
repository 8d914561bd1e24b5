"""The embedded corpus: made by `synthesize.py`, so that its exact cross-entropy is known."""
