"""Benchmarks: ratios within one run, medians; results are committed with the device's name."""
