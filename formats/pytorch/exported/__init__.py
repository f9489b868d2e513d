"""Exported programs (.pt2)."""
