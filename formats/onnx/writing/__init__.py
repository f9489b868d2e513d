"""Graphs with weights changed, and the nodes that decode them."""
