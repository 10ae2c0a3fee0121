"""The Triton kernels, one file per op. Nothing outside this folder imports triton."""
