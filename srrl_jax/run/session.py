"""The plumbing around the loop: where a run stands, its logs and checkpoints, and how it is ended."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Self

import jax
from rich.console import Console
from rich.text import Text

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.parallel import is_main
from srrl_jax.programs import Compiled, DoesNotFit, Program, compile_ahead
from srrl_jax.run.checkpoint import Checkpoints, Position
from srrl_jax.run.checks import write_config
from srrl_jax.run.guards import SkippedUpdates, new_warnings
from srrl_jax.run.preemption import Preempted, Preemption
from srrl_jax.run.tokens import tokens_path, write_tokens
from srrl_jax.sampling import Completion
from srrl_jax.telemetry import LiveTable, RunLog
from srrl_jax.telemetry.trackers import Trackers
from srrl_jax.training.batch import UpdateBatch
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.memory import fits
from srrl_jax.training.monitor import divergence_warnings
from srrl_jax.training.update import TrainState

# Until the update a step has changed nothing, so the state is still that of the step before.
_SAFE = ("rollout", "grade", "logprob")
OnStep = Callable[[int, Mapping[str, float], Sequence[dict]], None]
_BEAT = 5.0  # seconds
_LATE = 1.0  # seconds that a compilation in the middle of a run takes to be told of


class Session:
    """A context manager around the steps of one run; made when all input has been checked.

    With several processes all go through it alike, checkpoints are written by all, the rest by the main one.

    Attributes:
      step: steps done, all written down.
      fresh: whether nothing has been done at all, not even the evaluation before the first step.
      times: of the step under way, to be added to.
      warned: whether the last evaluation ends the run, see `eval.stop_on_warning`.
    """

    def __init__(
        self,
        config: TrainConfig,
        changes: Sequence[str],
        identity: Mapping[str, str],
        callbacks: Sequence[OnStep] = (),
    ):
        self._config, self._changes = config, changes
        self._identity, self._callbacks = identity, callbacks
        self._run_dir = storage.locate(config.run_dir)
        self.step, self.fresh, self.warned = 0, True, False
        self.times: dict[str, float] = {}
        self._skips = SkippedUpdates(self._run_dir, config.optimizer.max_skipped)
        self._saved: int | None = None
        self._next_beat = 0.0
        self._compiled: list[Compiled] = []  # ahead, all that was known
        self._state: TrainState | None = None
        self._metrics: dict[str, float] = {}
        self._phase = ""  # the one under way, or the one that failed

    @property
    def skipped(self) -> int:
        """Updates that were skipped so far because they were not finite."""
        return self._skips.total

    def __enter__(self) -> Self:
        c = self._config.checkpoint
        with ExitStack() as stack:
            self._checkpoints = stack.enter_context(Checkpoints(self._run_dir, c))
            self.log = RunLog(self._run_dir)
            console = Console(quiet=not is_main())
            self._live = stack.enter_context(LiveTable(self._config.steps, console))
            self._preemption = Preemption(c.preemption_seconds, self._give_up, self._told)
            stack.enter_context(self._preemption)
            stack.enter_context(each_compilation(self._live.compiling, self._compiled_late))
            if is_main():
                c = self._config
                self._trackers = stack.enter_context(Trackers(c.trackers, self._run_dir, c.to_dict()))
            stack.push(self._on_preempted)  # first to run, so within the time that SIGTERM leaves
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> bool:
        return self._stack.__exit__(*exception)

    def resume(self, like: TrainState) -> TrainState:
        """The state of the last good checkpoint, or `like`; takes the logs back to it.

        Raises:
          InputError: there are checkpoints, but none can be read.
        """
        found = self._checkpoints.restore_latest(like)
        if is_main():
            write_config(self._config, self._identity)
            self.log.rewind(-1 if found is None else found[0].step)
        if found is None:
            self._state = like
            self._event("start", f"{self._config.steps} steps")
            return like
        position, self._state, messages = found
        self.step = self._saved = position.step
        self.fresh = False
        self._skips.total, self._skips.in_a_row = position.skipped, position.skipped_in_a_row
        self._live.resume(self.step)
        for message in messages:
            self._event("damaged checkpoint", message)
        changed = f"; {'; '.join(self._changes)}" if self._changes else ""
        self._event("resume", f"from the checkpoint of step {self.step}{changed}")
        return self._state

    def compile_ahead(self, programs: Sequence[Program], mesh: jax.sharding.Mesh) -> None:
        """Compiles all programs of the run, or loads them from JAX's cache; later compilations are events."""
        if self.step >= self._config.steps:
            return  # nothing is left to run
        with self.phase("compile") as tell:
            done = 0

            def told(compiled: Compiled, total: int) -> None:
                nonlocal done
                done += 1
                self._live.compiling(compiled.name)
                tell(done, total)

            compiled = compile_ahead(programs, mesh, told)
        self._live.compiling("")
        self._compiled = compiled

    def _compiled_late(self, name: str, seconds: float) -> None:
        """Tells of a program that was not compiled ahead; small ones are not worth it."""
        self._took("compile", seconds if self._compiled else 0.0)
        if self._compiled and seconds > _LATE:
            self._event("compiled", f"{name} in the middle of the run, {seconds:.1f} s")

    def remaining(self) -> Iterator[int]:
        """The steps that are to be done, up to a warning where it ends the run.

        Those of `profile` are traced into `run_dir/profile`.
        """
        for step in range(self.step + 1, self._config.steps + 1):
            if self.warned:
                self._event(
                    "stopped", "by eval.stop_on_warning; the same command goes on to the next evaluation"
                )
                return
            self._preemption.check_between_steps()
            traced = step in self._config.profiled
            with jax.profiler.trace(self._run_dir / "profile") if traced else nullcontext():
                yield step

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Shows and times a part of a step; yields what to call with (done, total) on the way."""
        start = time.perf_counter()

        def progress(done: int, total: int) -> None:
            self._live.note(f"{done}/{total}")
            self._beat(name, f"{done}/{total}")
            if name in _SAFE:
                self._preemption.check()

        if name in _SAFE:
            self._preemption.check()
        self._beat(name)
        self._phase = name
        with fits(name, self._compiled), self._live.phase(name):
            yield progress
        self._phase = ""
        self._took(name, time.perf_counter() - start)

    def _beat(self, phase: str, note: str = "") -> None:
        """Says in the run directory what is being done, for `srrl status`; every few seconds at most."""
        if is_main() and time.monotonic() > self._next_beat:
            with self._disk_errors():
                self.log.progress(self.step, phase, note)
            self._next_beat = time.monotonic() + _BEAT

    def _took(self, name: str, seconds: float) -> None:
        """Adds to the time of a part of the step, which may come several times."""
        self.times[f"time/{name}"] = self.times.get(f"time/{name}", 0.0) + seconds

    def note_dropped(self, rows: Sequence[str]) -> None:
        """Tells of rows that were too long, all of them."""
        if rows:
            self._event("dropped rows", f"{len(rows)} by data.too_long: {'; '.join(rows)}")

    def note_skipped(self, step: int, learnt: Sequence[dict], minibatches: Sequence[UpdateBatch]) -> None:
        """Counts and tells of a step's updates that were skipped."""
        with self._disk_errors():
            for path in self._skips.note(step, learnt, minibatches):
                self._event("skipped update", f"loss or gradient not finite; its batch is {path}", step)

    def write(
        self,
        step: int,
        state: TrainState,
        metrics: dict[str, float],
        samples: list[dict],
        groups: Sequence[Sequence[Completion]] | None = None,
    ) -> None:
        """Writes down what a step did, with the tokens of its completions, and a checkpoint where due.

        Raises:
          InputError: the disk is full, or the last updates were all skipped.
        """
        parted = divergence_warnings(metrics, self._config.eval)
        self.warned = self._config.eval.stop_on_warning and bool(parted) and step > 0
        if is_main():
            with self._disk_errors():
                if groups is not None:
                    write_tokens(tokens_path(self._run_dir, step), groups)
                self.log.write(step, metrics, samples, self.times)
                missed = self._trackers.write(step, metrics | self.times, samples)
                for message in [*new_warnings(metrics, self._metrics), *parted, *missed]:
                    self._event("warning", message, step)
            for callback in self._callbacks:
                callback(step, metrics | self.times, samples)
        self._live.update(step, metrics | self.times)
        self.times.clear()  # so the next line tells how long this checkpoint took
        self.step, self._state, self._metrics, self.fresh = step, state, metrics, False
        self._skips.check()
        if step % self._config.checkpoint.every == 0 or step == self._config.steps or self.warned:
            self._save()

    def _save(self) -> None:
        if self.step == self._saved or self.step == 0:
            return  # the state before the first step is made anew as fast
        with self.phase("checkpoint"):
            c, skips = self._config, self._skips
            row = self.step * c.prompts_per_step
            position = Position(self.step, c.seed, row, skips.total, skips.in_a_row)
            self._checkpoints.save(position, self._state, self._metrics)
        self._saved = self.step

    def _on_preempted(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        if not isinstance(error, Preempted):
            # Of several processes another may have been lost first; the run goes on with its next start.
            told = isinstance(error, InputError) or jax.process_count() == 1
            # A judge that fails does so on all processes; a full disk has no room for a checkpoint.
            refused = isinstance(error, InputError) and not isinstance(error.__cause__, OSError)
            judged = refused and self._phase in ("grade", "eval")
            if (judged or isinstance(error, DoesNotFit)) and self._state is not None:
                # After an update the arrays of the step before are given away.
                if not any(x.is_deleted() for x in jax.tree.leaves(self._state)):
                    self._save()
            if error is not None and told and is_main():
                with suppress(OSError):  # such as the full disk that ended the run
                    self.log.event(self.step, "failed", f"{kind.__name__}: {error}")
            return
        self._save()
        self._checkpoints.wait()
        done = f"saved step {self.step}" if self.step else "no step was done"
        self._event(error.event, f"{error.signal}; {done}. Run the same command to go on")

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self._run_dir}: cannot write the logs: {error.strerror}. "
                "Make room or mend the directory, then run the same command to go on"
            ) from error

    def _give_up(self) -> None:
        seconds, last = self._config.checkpoint.preemption_seconds, self._checkpoints.steps()
        kept = f"the checkpoint of step {last[-1]}" if last else "the start"
        message = (
            f"SIGTERM; no safe point within {seconds:g} s, so what follows {kept} is lost. "
            "Run the same command to go on"
        )
        if is_main():
            self.log.event(self.step, "preempted", message)
        print(f"srrl: {message} (exit code {Preempted.exit_code})", file=sys.stderr, flush=True)

    def _told(self) -> None:
        text = "Ctrl-C: this step is finished and saved first; once more leaves at once, without it"
        self._live.console.print(Text(text), soft_wrap=True)

    def _event(self, kind: str, message: str, step: int | None = None) -> None:
        step = self.step if step is None else step
        if is_main():
            self.log.event(step, kind, message)
        self._live.console.print(Text(f"step {step}: {kind}: {message}"), soft_wrap=True)


@contextmanager
def each_compilation(name: Callable[[str], None], tell: Callable[[str, float], None]) -> Iterator[None]:
    """Calls `name` with each program that JAX begins to compile, or to load from its cache, and with "" after
    it; `tell` with the program and the seconds that it took."""

    def listen(event: str, seconds: float, fun_name: str = "", **_: object) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":  # what comes before
            name(fun_name)
        elif event == "/jax/core/compile/backend_compile_duration":
            name("")
            tell(fun_name, seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
