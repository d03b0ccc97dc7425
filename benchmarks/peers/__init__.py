"""Models of other libraries, timed under the same conditions as ours."""
