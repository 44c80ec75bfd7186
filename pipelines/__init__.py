"""Whole jobs, run in parallel."""
