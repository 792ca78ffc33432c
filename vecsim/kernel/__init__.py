"""The numba kernels: arrays in, arrays out. Nothing here knows a declaration, xarray or a file."""
