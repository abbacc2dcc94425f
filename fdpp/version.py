"""The version, in its one place; `setup.py` reads this file by itself, where torch is not installed."""

__version__ = "0.1.0"
