"""Arithmetic on arrays, below the intermediate representation."""
