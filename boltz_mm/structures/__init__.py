"""Data elements that cross module borders."""
