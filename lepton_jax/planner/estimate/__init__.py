"""Cost of an assignment: seconds, bytes, and how the host feeds the program."""
