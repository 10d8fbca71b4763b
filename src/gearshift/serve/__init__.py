"""Serving: one copy of the weights, a preset for each request."""
