"""Triton kernels and their launchers, one file an op. Needs torch and triton alone; the folder can be copied as it stands."""
