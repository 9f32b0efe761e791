"""Fake quantizers and the observers that find their ranges."""
