"""MXFP4: how its weights are stored."""
