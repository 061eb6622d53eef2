"""Benchmarks: one file each. A task says what is asked of which clips, and by which rule answers are scored."""
