"""Language models whose capacity sits in large, sparsely read memory tables."""

__version__ = "0.1.0"
