"""Reads a committed step back into tensors, all of it verified or none of it returned."""
