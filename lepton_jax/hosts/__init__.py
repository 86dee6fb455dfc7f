"""What a process knows of the other hosts of its run, and what they agree on."""
