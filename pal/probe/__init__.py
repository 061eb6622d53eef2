"""Probes: where a model's answers come from, and how much worse they get when a part of the audio is masked.

Every probe takes a model and gives a `ProbeResult`, which becomes one folder of JSON and pictures.
"""
