"""Helpers shared by `probe`, `bench` and `report`: records to ask about, number formats, tables, names of runs.

Together they are the laboratory of the package: they may use all of it, and only the commands in `pal/app/` use them.
Plots are rendered by `pal/plots.py`, which is not part of it, since training draws a plot as well.
"""
