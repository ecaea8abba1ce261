"""Serving a bundle: encode, retrieve, rank. Runs without torch and imports nothing of `models` or `export`."""
