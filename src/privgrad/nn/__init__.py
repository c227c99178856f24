"""Layers and models that behave under differential privacy."""
