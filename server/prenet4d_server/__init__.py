"""prenet4d server: the live service."""
