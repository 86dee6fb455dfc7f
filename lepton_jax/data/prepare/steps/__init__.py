"""The steps of a preparation, one kind a file."""
