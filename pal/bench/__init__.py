"""Measurements of cost."""
