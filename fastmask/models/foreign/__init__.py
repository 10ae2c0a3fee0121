"""Weights of other dense transformers, rearranged for a `MaskDiT` without a decoder."""
