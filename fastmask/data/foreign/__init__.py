"""Importers for latents extracted by other projects."""
