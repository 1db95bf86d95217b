"""Starts the writer of a checkpointer."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator

import msgspec

from asyncckpt.options import Compression, Writer
from asyncckpt.policies.keep import Keep
from asyncckpt.policies.mirror import Mirror
from asyncckpt.repository.lock import RunLock
from asyncckpt.writer.client import WriterClient, WriterNews
from asyncckpt.writer.link import Link, ProcessLink, ThreadLink, can_start_process
from asyncckpt.writer.logs import wanted_level
from asyncckpt.writer.messages import Configure, MirrorTo

__all__ = ["release_on_error", "runs_as_process", "start_writer"]


def runs_as_process(options: Writer) -> bool:
    """Whether the writer gets a process of its own, as *options* and the platform have it."""
    if options.kind == "process" and not can_start_process():
        warnings.warn(
            "this platform cannot pass memory to a writer process; the writer runs as a thread and will "
            "take time from training",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    return options.kind == "process"


def start_writer(
    url: str,
    lock: RunLock,
    options: Writer,
    compression: Compression,
    keep: Keep,
    mirror: Mirror | None,
    check_finite: bool,
    on_news: Callable[[WriterNews], None],
    *,
    as_process: bool,
) -> WriterClient:
    """Start the writer for the root at *url*; it inherits *lock*, so that none starts beside it.

    Raises:
        WriterError: it cannot be started.
    """

    def start() -> Link:
        return ProcessLink(options.nice, (lock.fileno(),)) if as_process else ThreadLink()

    configure = Configure(
        root=url,
        trainer_pid=os.getpid(),
        compression=compression,
        threads=options.threads,
        log_level=wanted_level(),
        keep=msgspec.Raw(msgspec.json.encode(keep)),
        incremental=options.incremental,
        check_finite=check_finite,
        mirror=None if mirror is None else _mirror_to(mirror, keep),
    )
    return WriterClient(configure, start, options.restarts, options.stall_timeout_s, on_news)


@contextlib.contextmanager
def release_on_error(lock: RunLock) -> Iterator[None]:
    """Release *lock* when what is started in the block cannot be started."""
    try:
        yield
    except BaseException:
        lock.release()
        raise


def _mirror_to(mirror: Mirror, keep: Keep) -> MirrorTo:
    return MirrorTo(
        root=os.fspath(mirror.root),
        keep=msgspec.Raw(msgspec.json.encode(mirror.keep or keep)),
        mount=None if mirror.mount is None else os.fspath(mirror.mount),
        close_timeout_s=mirror.close_timeout_s,
    )
