"""The asv suite. With VECSIM_BENCHMARKS_TINY set, every benchmark is small enough to be run as a test."""
