"""Benchmarks: ratios in one run, against what a user would do instead."""
