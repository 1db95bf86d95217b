"""Which failed saves are written again, and when. Pure."""

from __future__ import annotations

import errno

from asyncckpt.errors import StorageError

__all__ = ["RETRY_DELAYS_S", "retry_delay"]

RETRY_DELAYS_S = (0.1, 0.5, 2.0)
"""Seconds to wait before each further attempt. Their sum bounds what a dying disk costs."""

# Errors that come from a moment, not from a fact. Full disks, quotas, read-only mounts and missing rights are
# facts: a retry would only delay the news, and write the same gigabytes into the same wall.
_TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "EAGAIN", "EBUSY", "EINTR", "ENOMEM", "ENOBUFS", "EREMOTEIO", "ESTALE", "ETIMEDOUT",
        "ECONNRESET", "ECONNABORTED", "ENETDOWN", "ENETRESET", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH",
        "ENOLINK", "ECOMM", "EPROTO", "ESHUTDOWN",
    )
    if hasattr(errno, name)
)  # fmt: skip


def retry_delay(error: BaseException, attempt: int) -> float | None:
    """Seconds to wait before attempt ``attempt + 1`` of a save whose attempt number *attempt* met *error*.

    Args:
        error: why the attempt failed.
        attempt: 0 for the first.

    Returns:
        None when *error* is permanent or the attempts are used up.
    """
    if not isinstance(error, StorageError) or error.errno not in _TRANSIENT or attempt >= len(RETRY_DELAYS_S):
        return None
    return RETRY_DELAYS_S[attempt]
