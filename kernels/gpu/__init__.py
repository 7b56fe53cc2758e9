"""Where a GPU does better than plain torch: Triton kernels, with the meanings that `kernels.reference` has.

They run in Triton's interpreter too (`TRITON_INTERPRET=1`), on a CPU's tensors. Importing a module of
this package needs Triton; `availability`, `paged`, `attention` and `flashinfer_attention` don't.
"""
