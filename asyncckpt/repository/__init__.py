"""A root of checkpoints: committing, finding, verifying and removing steps."""
