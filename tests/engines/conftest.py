"""Hypothesis must not time examples: machines are shared, and torch's first call is slow."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
