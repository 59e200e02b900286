"""Trains the hybrid transformer on a folder of text, byte by byte; `python -m train --help`."""
