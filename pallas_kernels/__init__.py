"""Block-sparse attention kernels for NVIDIA GPUs: arrays and block lists in, arrays out."""
