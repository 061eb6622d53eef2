"""Probes of trained models: attention to audio, masking, layer depth, timing, linear probes, health, ablations.

Every probe returns a `ProbeResult`, which is saved as a folder of JSON and pictures.
"""
