"""Registered data preprocessors."""
