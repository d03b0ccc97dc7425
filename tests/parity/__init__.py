"""Comparisons with the authors' numbers: one test per golden file, dispatched on what the file says it is."""
