"""Differential privacy: clipping, noise, accounting, cryptographic randomness."""
