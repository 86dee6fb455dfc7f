"""Measurements and proofs of what a shipped model does."""
