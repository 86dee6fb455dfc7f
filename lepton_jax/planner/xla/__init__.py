"""A model of XLA's compiler: its fusion, its schedule, its heap."""
