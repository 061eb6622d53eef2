"""What probes, benchmarks and reports share: records to ask about, numbers and tables in words, names of runs.

Those three are a laboratory. It uses the package, and nothing of the package uses it but the commands in `pal/app/`.
How plots become pictures is `pal/plots.py`, since training draws one as well.
"""
