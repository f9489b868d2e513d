"""PyTorch files (https://pytorch.org), read without PyTorch: nothing that they name is imported or executed."""
