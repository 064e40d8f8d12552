"""The training loop: batches in, checkpoints and metrics out, stoppable and resumable at any moment."""

import math
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax

from smoljax import files, optim, parallel
from smoljax.command_line import STOPPED
from smoljax.errors import SmoljaxError
from smoljax.evaluation import perplexity
from smoljax.model import logical_axes
from smoljax.progress import Progress
from smoljax.training.checkpoint import Checkpoints
from smoljax.training.metrics import MetricsWriter
from smoljax.training.run import Run
from smoljax.training.state import TrainState, make_state
from smoljax.training.step import make_eval_step
from smoljax.training.throughput import peak_flops


def train(run: Run) -> int:
    """Trains from the newest checkpoint, or from the start, to the last step.

    Returns:
      0 when done; 42 when stopped on request (SIGTERM, SIGINT) after saving.
    """
    training, mesh = run.training, run.mesh
    run.check_mesh(mesh)
    mixture = run.mixture
    checkpoints = run.checkpoints()
    newest = checkpoints.latest_step()
    start = newest or 0
    sizes = run.data.batch_sizes
    train_step = run.train_step()
    with ThreadPoolExecutor(1) as beside:
        making = beside.submit(_first_state, run, checkpoints, newest)
        # Tracing is Python's and takes one core; the other compiles and runs the program of the parameters.
        run.lower(train_step, run.batch_shapes(sizes.size(start))).compile()
        state = making.result()
    if newest is not None:  # Step 0 is a model that `convert` brought in.
        _say(f"resuming from step {start:,} in {run.train_directory}")
    else:
        _describe(run)
    _write_config(run)
    evaluate = _evaluator(run)
    rows = {size: parallel.local_rows(mesh, size) for size in sizes.sizes}
    batches = mixture.loader(start, rows=rows)
    log = _Log(run, start_step=start)
    stop = _StopRequest()
    saved = start
    step = start
    try:
        while step < training.num_steps:
            _, batch = next(batches)
            size = sizes.size(step)
            on_mesh = parallel.put_batch(
                {key: batch[key] for key in perplexity.BATCH_DTYPES},
                mesh,
                rows=rows[size],
                batch_size=size,
            )
            state, metrics = train_step(state, on_mesh)
            step += 1
            last = step == training.num_steps
            log.step(step, metrics, last=last)
            if step % training.eval_every == 0 or last:
                params = optim.evaluation_params(state.opt_state, state.params)
                log.held_out(step, evaluate(params))
            if step % training.checkpoint_every == 0 or last:
                log.flush()  # Raises on a loss that is not finite: such a state is never saved.
                checkpoints.save(step, state)
                saved = step
            if stop.requested(step) and not last:
                break
        if saved != step:
            log.flush()
            checkpoints.save(step, state)
        checkpoints.wait()
        log.close()
        checkpoints.close()
    finally:
        stop.restore()
    if step < training.num_steps:
        _say(f"stopped on request; step {step:,} is saved: the same command goes on from there")
        return STOPPED
    return 0


def _first_state(run: Run, checkpoints: Checkpoints, newest: int | None) -> TrainState:
    """The state saved at step `newest`, or a fresh one."""
    if newest is None:
        return make_state(run.model, run.optimizer, seed=run.seed, shardings=run.shardings)
    return checkpoints.restore(run.shapes, run.shardings)


def _evaluator(run: Run) -> Callable[[dict], dict]:
    eval_step = make_eval_step(
        run.model,
        mesh=run.mesh,
        shardings=run.shardings.params,
        loss_chunk=run.training.loss_chunk,
        quantization=run.training.quantization,
    )

    def evaluate(params: dict) -> dict:
        return perplexity.held_out(
            eval_step,
            params,
            run.mixture,
            mesh=run.mesh,
            batch_size=run.data.batch_size,
            max_batches=run.training.eval_batches,
        )

    return evaluate


class _Log:
    """Metrics rows and the progress line. Reads a step's metrics one step late, so that the device never waits for the host."""

    def __init__(self, run: Run, *, start_step: int):
        self._training, self._run = run.training, run
        self._lead = jax.process_index() == 0
        schedule = optim.learning_rate_schedule(
            run.optimizer_config, run.training.num_steps, multipliers=run.multipliers
        )
        self._schedule = jax.jit(schedule)  # One small program, where op by op it would be ten.
        self._peak: float | None = None
        self._writer = (
            MetricsWriter(run.train_directory, resume_step=start_step) if self._lead else None
        )
        self._progress = Progress("train", run.training.num_steps, unit="steps")
        self._progress.start_at(start_step)
        self._flops_per_token = run.model.flops_per_token(run.data.seq_len, attention="causal")
        self._pending: tuple[int, dict] | None = None
        self._mark = (start_step, time.perf_counter())

    def step(self, step: int, metrics: dict, *, last: bool) -> None:
        """Takes the (still running) metrics of a step, and writes those of the step before; the first at once."""
        self.flush()
        self._pending = (step, metrics)
        if last or self._peak is None:
            self.flush()
        if self._peak is None:
            self._finish_start(step)

    def flush(self) -> None:
        """Writes the step that is still held back; raises when its loss or parameters are not finite."""
        if self._pending is not None:
            self._write(*self._pending)
            self._pending = None

    def held_out(self, step: int, results: dict) -> None:
        """Writes held-out loss and bits per byte of each source."""
        if not self._lead:
            return
        row = {}
        for source, values in results.items():
            row[f"heldout/{source}/bits_per_byte"] = values["bits_per_byte"]
            row[f"heldout/{source}/loss"] = values["loss"]
        self._writer.write(step, row)
        _say(
            f"step {step:,}: held-out bits per byte "
            + "  ".join(
                f"{source} {values['bits_per_byte']:.3f}" for source, values in results.items()
            )
        )
        self._mark = (step, time.perf_counter())  # Evaluation is not training time.

    def close(self) -> None:
        self.flush()
        if self._lead:
            self._progress.close()
            self._writer.close()

    def _finish_start(self, step: int) -> None:
        """What can wait until the first step is done. The peak comes first, while nothing shares the cores with it."""
        self._peak = peak_flops(jax.devices()[0]) * len(jax.devices())
        if self._lead:
            self._writer.start_events()
        self._mark = (step, time.perf_counter())

    def _write(self, step: int, metrics: dict) -> None:
        at_row = step % self._training.log_every == 0 or step in (1, self._training.num_steps)
        loss, norm = float(metrics["loss"]), float(metrics["param_norm"])
        skips = self._run.optimizer_config.skip_spikes  # Such a step changes nothing then.
        if not (math.isfinite(norm) and (math.isfinite(loss) or skips)):
            raise SmoljaxError(
                f"the loss of step {step} is {loss}, the norm of the parameters after it {norm}; nothing was saved after the last checkpoint. See which documents "
                f"the batch holds with open_mixture(...).documents({step - 1}), lower config.optimizer.learning_rate "
                "or clip harder (config.optimizer.clip_norm), and run again"
            )
        if not at_row:
            return
        then, when = self._mark
        now = time.perf_counter()
        row = {name: float(value) for name, value in metrics.items()}
        row["learning_rate"] = float(self._schedule(step - 1))
        row["tokens"] = self._tokens(step)
        detail = f"loss {loss:.4f}"
        if step > then:
            rate = (self._tokens(step) - self._tokens(then)) / (now - when)
            row["tokens_per_second"] = rate
            detail += f"  {rate:,.0f} tokens/s"
            if self._peak is not None:
                row["mfu"] = rate * self._flops_per_token / self._peak
                detail += f"  MFU {100 * row['mfu']:.1f}%"
        self._mark = (step, now)
        if self._lead:
            self._writer.write(step, row)
            self._progress.update(step, detail)

    def _tokens(self, step: int) -> int:
        """Tokens of all steps up to this one."""
        return self._run.data.batch_sizes.before(step) * self._run.data.seq_len


class _StopRequest:
    """Turns SIGTERM and SIGINT into a question that the loop asks between steps; a second SIGINT kills."""

    def __init__(self):
        self._received = False
        self._several_hosts = jax.process_count() > 1
        self._old = {}
        if not self._several_hosts:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True
        _say("stopping after this step ...")

    def requested(self, step: int) -> bool:
        """Whether to stop now; all hosts agree on the step."""
        if self._several_hosts:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _describe(run: Run) -> None:
    if jax.process_index():
        return
    _say(
        optim.describe(
            run.params_shapes,
            optim.treatments(run.optimizer_config, run.multipliers),
            logical_axes=logical_axes(run.model),
        )
    )
    _say(
        f"{run.model.num_params:,} parameters ({run.model.num_params_without_embedding:,} without embedding), "
        f"{run.training.num_steps:,} steps of {' then '.join(map(str, run.data.batch_sizes.sizes))} x {run.data.seq_len} tokens, "
        f"mesh {dict(run.mesh.shape)} "
        f"of {jax.devices()[0].device_kind}"
    )


def _write_config(run: Run) -> None:
    if jax.process_index() == 0:
        files.atomic_write_json(run.train_directory / "config.json", run.config)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
