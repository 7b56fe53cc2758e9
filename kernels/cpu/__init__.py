"""Where a CPU does better than plain torch: the names and meanings of `kernels.reference`."""
