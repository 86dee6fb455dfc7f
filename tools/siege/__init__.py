"""Besiege `lepton serve`: load, bad requests, kills, and the clients of others.

Run `python -m tools.siege --help` from the root.
"""
