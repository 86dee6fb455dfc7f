"""The hosts of a run: who they are, how they meet, who supervises them."""
