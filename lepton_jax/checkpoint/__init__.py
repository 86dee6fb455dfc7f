"""States on disk: the durable tier, the fast local tier, and their adoption."""
