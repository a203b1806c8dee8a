"""The stages: each a function with plain arguments that the command line and a notebook can both call."""
