"""The doctor: what a machine can do, and whether the hypergradient is right on it."""
