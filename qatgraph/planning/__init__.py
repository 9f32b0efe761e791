"""Constraints in, one solver, a plan out. Everything here but ``facts`` reads without torch."""
