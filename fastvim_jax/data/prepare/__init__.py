"""Offline tools behind `fastvim data`: check a data set, or write it as ArrayRecord shards."""
