"""Measurements: one module a figure, results as JSON with their provenance."""
