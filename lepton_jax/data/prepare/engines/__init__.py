"""Engines: where the pieces of a pass are worked on."""
