"""A look inside: where a model's answers come from, and what it loses when a part of the audio is taken away.

Every probe takes a model and gives a `ProbeResult`, which becomes one folder of JSON and pictures.
"""
