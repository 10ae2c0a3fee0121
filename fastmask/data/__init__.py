"""Data sets, and the batches that training draws from them."""

from fastmask.data import _system  # noqa: F401  (first)
from fastmask.data.dataset import DataSet, open_data
from fastmask.data.loader import batches, sample_ids
from fastmask.data.store.reader import LatentStore

__all__ = ["DataSet", "LatentStore", "batches", "open_data", "sample_ids"]
