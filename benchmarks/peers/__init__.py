"""Time models of other libraries under the same conditions as ours."""
