"""Benchmarks, one file each: clips, prompts and scoring rule."""
