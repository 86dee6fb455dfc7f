"""A plan against XLA's compiled program."""
