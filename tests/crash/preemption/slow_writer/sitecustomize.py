"""On the path of a writer process, this makes its storage slow: so many bytes per second as the environment says."""

import os
import sys

if "asyncckpt.writer" in sys.orig_argv and "ASYNCCKPT_TEST_BYTES_S" in os.environ:
    from asyncckpt.stores import open_store
    from asyncckpt.testing import SlowStore
    from asyncckpt.writer import service

    service.open_store = lambda url: SlowStore(open_store(url), float(os.environ["ASYNCCKPT_TEST_BYTES_S"]))
