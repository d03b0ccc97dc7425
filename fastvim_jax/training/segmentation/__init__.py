"""Training of semantic segmentation."""
