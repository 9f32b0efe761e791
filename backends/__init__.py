"""Targets: a table (TOML) each, and for those that can be lowered a module with lower, load and audit."""
