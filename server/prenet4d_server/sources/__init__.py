"""Detectors: one file for each protocol, all turned into the events of ``base``."""
