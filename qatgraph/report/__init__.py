"""Reports: data, text."""
