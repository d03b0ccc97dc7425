"""A float64 NumPy reference of the models, written from their equations and from nothing else.

It shares no code with the package: loops where the package scans, flips where the package looks the other way,
explicit transposes where the package chooses an axis. Parameters come as a flat dictionary under the package's
canonical names (`blocks.3.mixer.in_proj.kernel`), configurations as any object with the package's field names.
"""
