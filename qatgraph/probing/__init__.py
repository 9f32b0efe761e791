"""Probing: every row of a target as small problems on the real engine, and the smallest that it does not honour."""
