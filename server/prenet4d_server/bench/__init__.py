"""Benchmarks that ship with the service, so that anyone can repeat them."""
