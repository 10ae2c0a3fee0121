"""Datasets and data loading."""

from fastmask.data import _system  # noqa: F401  (first)
from fastmask.data.dataset import Dataset, open_data
from fastmask.data.loader import batches, sample_ids
from fastmask.data.store.reader import StoreDataset

__all__ = ["Dataset", "StoreDataset", "batches", "open_data", "sample_ids"]
