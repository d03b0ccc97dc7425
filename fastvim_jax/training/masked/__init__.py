"""Masked autoencoders: pre-training and linear probing."""
