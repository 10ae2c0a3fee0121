"""Networks of the presets, without data."""

from bench.instruments.model import network
from fastmask.presets import PRESETS
from fastmask.training.config import preset_config


def preset_network(name):
    """The configuration of a preset and its network."""
    config = preset_config(name, PRESETS)
    return config, network(config)
