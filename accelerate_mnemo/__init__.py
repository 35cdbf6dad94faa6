"""Accelerate adapter. Not built yet."""
