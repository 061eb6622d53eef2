"""Scoring rules, one file each, as in the benchmarks' own scripts."""
