"""A campaign that breaks runs on several hosts, and judges what becomes of them.

Run `python -m tools.faults --help` from the root.
"""
