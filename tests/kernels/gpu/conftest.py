"""On a GPU, or in Triton's interpreter."""

from tests.kernels.gpu.device import bf16_in_the_interpreter, device

__all__ = ["bf16_in_the_interpreter", "device"]
