"""The pieces models are made of."""
