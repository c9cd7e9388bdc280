"""Rewrite passes, one a file, by family; importing this package registers them all."""
