"""Measurements of Lepton against what one would use without it.

Run `python -m tools.bench --help` from the root. Each command has a module of its own,
with an `add(commands, shared)` that adds it to the command line.
"""
