"""Trained networks in other people's formats: folders that diffusers loads without fastmask, and model cards."""
