"""Per-unit gradients, as fast as they can be had. Knows nothing of privacy."""
