"""Latents that other tools have written, as sources of a store."""
