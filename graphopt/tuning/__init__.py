"""Measured choices: trials in a child process within a clock budget, kept in a SQLite file."""
