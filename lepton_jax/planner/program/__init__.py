"""The traced program, and what a sharding does to it."""
