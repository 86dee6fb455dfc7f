"""Knowledge of a process about the other hosts of its run, and their agreements."""
