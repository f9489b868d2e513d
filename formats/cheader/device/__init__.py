"""What the arrays mean on a device: kernels, fixed point, flash."""
