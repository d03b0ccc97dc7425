"""The version of this library, in a file of its own because files of every room write it down."""

__version__ = "0.1.0"
