"""What one train step computes, as pure functions."""
