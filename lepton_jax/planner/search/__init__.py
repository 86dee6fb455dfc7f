"""The search for a plan: the problem, the descent, what the user fixed, advice."""
