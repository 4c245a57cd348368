"""Registered layers."""
