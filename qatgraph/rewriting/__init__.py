"""Patterns, passes and the manager that runs and checks them."""
