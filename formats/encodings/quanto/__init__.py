"""optimum-quanto: how its weights are stored."""
