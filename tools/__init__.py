"""Programs around the library: run from the root as `python -m tools.NAME`."""
