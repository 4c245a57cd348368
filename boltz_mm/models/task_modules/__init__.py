"""Registered task modules."""
