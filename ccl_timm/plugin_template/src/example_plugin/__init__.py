"""A loss, a head and a model for ccl-timm, found by name once this package is installed."""

__version__ = '0.1.0'
