"""Necks and heads of semantic segmentation, on the dense features of any backbone."""
