"""SIGTERM: a machine that is about to be taken away (a spot TPU gets 30 s, so does a Kubernetes pod)."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Self

from srrl_jax.parallel import gather

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class Preempted(SystemExit):
    """Leaves the loop at a safe point; a process that nobody catches it in exits with `EXIT_CODE`."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class Preemption:
    """A context manager that turns SIGTERM into `Preempted`, raised where the loop calls `check`.

    Where that takes longer than `seconds` (a long compilation, a slow disk), the process exits with the
    same code from a thread, after a call of `on_timeout`; what is on disk is then the last checkpoint.
    A second SIGTERM changes nothing.
    """

    def __init__(self, seconds: float, on_timeout: Callable[[], None]):
        self._seconds, self._on_timeout = seconds, on_timeout
        self._asked, self._over = threading.Event(), threading.Event()

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals; there SIGTERM stays what it was
        # Python runs handlers between bytecodes of the main thread, so not while XLA computes. The
        # wake-up descriptor is written at once, and a thread waits for it.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not hasattr(self, "_thread"):
            return
        signal.signal(signal.SIGTERM, self._old_handler)
        signal.set_wakeup_fd(self._old_descriptor)
        self._over.set()
        os.close(self._write)  # ends the thread's read
        self._thread.join()
        os.close(self._read)

    def check(self) -> None:
        """Raises `Preempted` after SIGTERM; with several processes, on all after the SIGTERM of any."""
        if any(gather(self._asked.is_set())):
            raise Preempted

    def _watch(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] == signal.SIGTERM:
                self._asked.set()
                if not self._over.wait(self._seconds):
                    try:
                        self._on_timeout()
                    except Exception:  # a full disk, a directory that is gone: the time is up all the same
                        traceback.print_exc()
                    sys.stdout.flush()
                    os._exit(EXIT_CODE)
