"""Hard Patches Mining for masked video and image modelling."""

__version__ = "0.1.0"
