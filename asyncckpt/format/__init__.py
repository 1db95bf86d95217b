"""Format 1 at the level of bytes and JSON. Never imports torch or zarr; ``docs/format.md`` is its specification."""
