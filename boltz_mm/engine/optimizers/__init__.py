"""Optimizer wrappers, constructors and parameter schedulers."""
