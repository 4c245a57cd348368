"""Visualizers and pictures."""
