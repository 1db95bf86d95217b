"""Snapshots: copies of the live state in memory that the writer can read."""
