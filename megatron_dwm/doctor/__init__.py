"""The doctor reports what a machine can do, and checks the hypergradient on it."""
