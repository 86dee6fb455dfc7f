"""Parts of `tools.bench serve`: models, servers of others, a client."""
