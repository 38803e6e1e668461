"""SIGTERM and SIGINT: a machine that is about to be taken away, and a person's Ctrl-C.

A spot TPU gets 30 s between the signal and its end, so does a Kubernetes pod; a person can wait for a step.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Self

from srrl_jax.parallel import gather

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
INTERRUPTED = 128 + signal.SIGINT  # what a shell says of a command that Ctrl-C ended


class Preempted(SystemExit):
    """Leaves the loop at a safe point; a process that nobody catches it in exits with its `exit_code`."""

    event, signal, exit_code = "preempted", "SIGTERM", EXIT_CODE

    def __init__(self) -> None:
        super().__init__(self.exit_code)


class Interrupted(Preempted):
    """Leaves the loop between two steps, after SIGINT."""

    event, signal, exit_code = "interrupted", "SIGINT", INTERRUPTED


class Preemption:
    """A context manager that turns SIGTERM into `Preempted` and SIGINT into `Interrupted`.

    They are raised where the loop calls `check` and `check_between_steps`. Where that takes longer than
    `seconds` after SIGTERM (a long compilation, a slow disk), the process exits with the same code from a
    thread, after a call of `on_timeout`; what is on disk is then the last checkpoint. A second SIGTERM
    changes nothing. `on_interrupt` is called at the first SIGINT; at the second the process exits at once.
    """

    def __init__(self, seconds: float, on_timeout: Callable[[], None], on_interrupt: Callable[[], None]):
        self._seconds, self._on_timeout, self._on_interrupt = seconds, on_timeout, on_interrupt
        self._asked, self._over, self._interrupted = (threading.Event() for _ in range(3))

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals; there signals stay what they were
        # Python runs handlers between bytecodes of the main thread, so not while XLA computes. The
        # wake-up descriptor is written at once, and a thread waits for it.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old_handlers = {
            number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)
        }
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not hasattr(self, "_thread"):
            return
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_descriptor)
        self._over.set()
        os.close(self._write)  # ends the thread's read
        self._thread.join()
        os.close(self._read)

    def check(self) -> None:
        """Raises `Preempted` after SIGTERM; with several processes, on all after the SIGTERM of any."""
        if any(gather(self._asked.is_set())):
            raise Preempted

    def check_between_steps(self) -> None:
        """Raises `Interrupted` after SIGINT; with several processes, on all after the SIGINT of any."""
        if any(gather(self._interrupted.is_set())):
            raise Interrupted

    def _watch(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] == signal.SIGINT:
                if self._interrupted.is_set():
                    os._exit(INTERRUPTED)
                self._interrupted.set()
                self._on_interrupt()
            elif number[0] == signal.SIGTERM:
                self._asked.set()
                if not self._over.wait(self._seconds):
                    try:
                        self._on_timeout()
                    except Exception:  # a full disk, a directory that is gone: the time is up all the same
                        traceback.print_exc()
                    sys.stdout.flush()
                    os._exit(EXIT_CODE)
