"""What a reader refuses, whatever the digests say, before it allocates or loops. ``docs/format.md`` lists them."""

from __future__ import annotations

__all__ = [
    "MAX_ARRAY_BYTES",
    "MAX_CHUNKS_PER_SHARD",
    "MAX_CHUNK_BYTES",
    "MAX_CODECS",
    "MAX_COUNT",
    "MAX_DIMENSIONS",
    "MAX_FILE_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_INDEX_BYTES",
    "MAX_METADATA_BYTES",
]

MAX_HEADER_BYTES = 256 * 2**20
MAX_INDEX_BYTES = 256 * 2**20
MAX_METADATA_BYTES = 2**20
MAX_DIMENSIONS = 64
MAX_CODECS = 8
# What one decoding thread may have to hold; we write chunks of at most 4 MiB and shards of 256 MiB.
MAX_CHUNK_BYTES = 64 * 2**20
MAX_FILE_BYTES = 2**30
MAX_CHUNKS_PER_SHARD = 2**16
MAX_ARRAY_BYTES = 2**50
MAX_COUNT = 2**60
