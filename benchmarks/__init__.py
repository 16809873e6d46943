"""Benchmarks beside their upper limits and other programs, and checks that need a GPU."""
