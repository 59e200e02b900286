"""Trains the hybrid transformer on text, plain or prepared; `python -m train --help`."""
