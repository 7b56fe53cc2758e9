"""The data plane: does what the control plane decided. The only home of torch beside kernels."""
