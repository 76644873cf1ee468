"""The training loop: read bytes, step, measure, save; and stop cleanly whenever asked.

One step is a function of the parameters, the optimizer state, the random states and the step's number. All of them
are in a checkpoint, so an interrupted and resumed run ends with the same bits as an uninterrupted one (same machine,
same number of threads).
"""

from __future__ import annotations

import math
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mhc_layers.models.transformer import Transformer
from mhc_layers.parallel.engine import Engine, Precision, WholeModelEngine
from mhc_layers.parallel.mesh import World
from mhc_layers.parallel.parallelize import parallelize
from mhc_layers.training.checkpoint import (
    Checkpoint,
    load_parameters,
    random_state,
    restore_random_state,
    restore_shards,
    save_checkpoint,
    save_sharded_checkpoint,
)
from mhc_layers.training.config import TrainConfig, encode
from mhc_layers.training.data import ByteWindows, Corpus, evaluation_windows
from mhc_layers.training.errors import NonFiniteLossError, ResumeError
from mhc_layers.training.metrics import MetricsLog, Throughput
from mhc_layers.training.monitor import Measurement, Monitor
from mhc_layers.training.optim import build_optimizers, load_optimizer_state, optimizer_state, set_learning_rate
from mhc_layers.training.progress import ProgressView
from mhc_layers.training.schedule import learning_rate_factor

__all__ = ["StopRequest", "Trainer", "choose_device", "choose_precision", "seed_everything"]

_LN2 = math.log(2.0)
_EVAL_ROWS = 64


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a wish to stop after the current step; the second one interrupts.

    Examples
    --------
    >>> from mhc_layers.training.loop import StopRequest
    >>> stop = StopRequest()
    >>> stop.wanted
    False
    """

    def __init__(self) -> None:
        self.wanted = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the signals inside the context (only the main thread can)."""
        previous = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, self._request)
        except ValueError:
            pass
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


class Trainer:
    """One run: a model, its data, its optimizers, and where it writes.

    Parameters
    ----------
    config : TrainConfig
        What to do.
    corpus : Corpus
        The bytes to train and validate on.
    folder : pathlib.Path
        The run directory.
    resume : Checkpoint, optional
        Continue from here instead of step 0.
    world : World, optional
        This process among all.
    view : ProgressView, optional
        What the person sees; nothing by default.

    Attributes
    ----------
    step : int
        Steps done.
    engine : Engine
        Runs the model.
    precision : Precision
        Dtype of its streams.
    num_parameters : int
        Numbers that the whole model trains, whatever part of it is here.
    monitor : Monitor
        Measures its connections.

    Raises
    ------
    ResumeError
        If the data differ from those of the checkpoint, or it has done more steps than are wanted.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        folder: Path,
        *,
        resume: Checkpoint | None = None,
        world: World | None = None,
        view: ProgressView | None = None,
    ) -> None:
        if resume is not None and resume.corpus != encode(corpus.record):
            raise ResumeError(
                f"the data are not those of the checkpoint: sha256 {corpus.record.sha256[:12]} now, "
                f"{str(resume.corpus.get('sha256'))[:12]} then. Give the same files with --data, or start a new run"
            )
        if resume is not None and resume.step > config.steps:
            raise ResumeError(
                f"steps is {config.steps}, but the checkpoint has done {resume.step}; give more --steps, or the path "
                "of an older checkpoint"
            )
        self.config, self.corpus, self.folder = config, corpus, folder
        self.world = world or World()
        self.view = view or ProgressView(config.steps, enabled=False)
        self.device = choose_device(config.device, self.world)
        if config.threads:
            torch.set_num_threads(config.threads)
        seed_everything(config.seed)
        if self.device.type == "cuda" and config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
        self.precision = choose_precision(config, self.device)
        model = Transformer(config.model).to(self.device)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine: Engine = parallelize(
            model, config.parallel, self.precision, world=self.world, compile=config.compile
        )
        self.optimizers = build_optimizers(self.engine.model, config.optim)
        self.windows = ByteWindows(
            corpus.train, seq_len=config.data.seq_len, batch_size=config.data.batch_size, seed=config.seed
        )
        share = config.data.batch_size // self.engine.data_size
        if share * self.engine.data_size != config.data.batch_size:
            raise ValueError(
                f"data.batch_size is {config.data.batch_size}; it must be a multiple of the {self.engine.data_size} "
                "processes that share the batch"
            )
        self._rows = slice(self.engine.data_rank * share, (self.engine.data_rank + 1) * share)
        self.monitor = Monitor(self.engine.model, config.monitor)
        self.last_measurement: Measurement | None = None
        self.step = 0
        self.seconds = 0.0
        self.first_bits: float | None = None
        self._bits = float("nan")
        self._throughput = Throughput()
        self._saved_step = -1
        self._last: tuple[Tensor, Tensor] | None = None
        if resume is not None:
            self._restore(resume)
        self.log = MetricsLog(folder, resume_step=None if resume is None else resume.step, enabled=self.world.is_main)

    def train(self, stop: StopRequest | None = None) -> bool:
        """Run until the last step or until ``stop`` wants it; a checkpoint is written in both cases.

        Returns
        -------
        bool
            True if the run is complete, False if it was stopped before.

        Raises
        ------
        NonFiniteLossError
            If the loss or the gradient norm is NaN or infinite. The checkpoints stay as they were.
        """
        stop = stop or StopRequest()
        config = self.config
        with ExitStack() as stack:
            stack.enter_context(self.view)
            stack.callback(self.log.close)
            stack.enter_context(_repeatable(config.deterministic and self.device.type == "cuda"))
            if self.first_bits is None:
                self.first_bits = self._validate()
            started = time.perf_counter() - self.seconds
            while self.step < config.steps and not self._anyone(stop.wanted):
                loss, norm = self._last = self._train_step()
                self.seconds = time.perf_counter() - started
                self._throughput.add(config.data.batch_size * config.data.seq_len)
                self._after_step(loss, norm)
                if self.step % config.eval.every == 0 and self.step < config.steps:
                    self._validate()
                if self.step % config.checkpoint.every == 0:
                    self.save()
            complete = self.step >= config.steps
            if self._last is not None:
                self._check_finite(self.step, *self._last)
            self.save()
        return complete

    def evaluate(self, max_bytes: int | None = None) -> float:
        """Return the bits per byte of held-out text.

        Parameters
        ----------
        max_bytes : int, optional
            Upper bound of the number of predicted bytes; all of them by default.
        """
        windows = evaluation_windows(self.corpus.held_out, seq_len=self.config.data.seq_len, max_bytes=max_bytes)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, len(windows), _EVAL_ROWS):
            tokens = self._to_device(windows[start : start + _EVAL_ROWS])
            total += self.engine.evaluate(tokens).to(torch.float64)
        return float(total) / (windows.shape[0] * self.config.data.seq_len) / _LN2

    def save(self) -> None:
        """Write a checkpoint of the current step, unless it is on disk already."""
        if self._saved_step == self.step:
            return
        parameters: dict[str, Tensor] = dict(self.engine.model.named_parameters())
        optimizer = optimizer_state(self.engine.model, self.optimizers)
        if not self.config.sharded_checkpoints:
            parameters, optimizer = self.engine.gather(parameters), self.engine.gather(optimizer)
        checkpoint = Checkpoint(
            step=self.step,
            config=encode(self.config),
            model=parameters,
            optimizer=optimizer,
            progress={
                "seconds": self.seconds,
                "monitor_seconds": self.monitor.seconds,
                "monitor_setup_seconds": self.monitor.setup_seconds,
                "first_bits_per_byte": self.first_bits,
                "bits_per_byte": self._bits,
            },
            corpus=encode(self.corpus.record),
            random=random_state(),
        )
        folder, keep = self.folder / "checkpoints", self.config.checkpoint.keep
        if self.config.sharded_checkpoints:
            save_sharded_checkpoint(folder, checkpoint, self.world, keep=keep)
        elif self.world.is_main:
            save_checkpoint(folder, checkpoint, keep=keep)
        self._saved_step = self.step

    def whole_model(self) -> Transformer:
        """Return the model with all its parameters on this process's device; all processes must call it."""
        if isinstance(self.engine, WholeModelEngine) and not self.world.in_group:
            return self.engine.model
        tensors = self.engine.gather(dict(self.engine.model.named_parameters()))
        model = Transformer(self.config.model).to(self.device)
        load_parameters(model, tensors)
        return model

    def _train_step(self) -> tuple[Tensor, Tensor]:
        """Do one optimizer step; return the loss (nats) and the gradient norm as device tensors."""
        config = self.config
        set_learning_rate(self.optimizers, learning_rate_factor(config.schedule, self.step, config.steps))
        tokens = self._to_device(self.windows.batch(self.step, self._rows))
        loss = self.engine.forward_backward(
            tokens, micro_batch_size=config.data.micro_batch_size, watch=lambda: self.monitor.watch(self.step + 1)
        )
        norm = self.engine.clip(config.optim.clip_norm)
        if self.device.type == "cpu":
            self._check_finite(self.step + 1, loss, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, norm

    def _after_step(self, loss: Tensor, norm: Tensor) -> None:
        """Log, measure and show what a step gave; the device is waited for only on steps that log."""
        config = self.config
        measurement = self.monitor.flush()
        if measurement is not None:
            self._log_measurement(measurement)
        on_cpu = self.device.type == "cpu"
        logs = self.step % config.log_every == 0 or self.step == config.steps
        saves = self.step % config.checkpoint.every == 0
        if not on_cpu and (logs or saves):
            self._check_finite(self.step, loss, norm)
        if logs or on_cpu:
            nats = float(loss)
            self.view.update(
                self.step,
                loss=nats,
                bits_per_byte=nats / _LN2,
                tokens_per_second=self._throughput.tokens_per_second,
            )
        if logs:
            self.log.write(
                "train",
                self.step,
                loss=nats,
                bits_per_byte=nats / _LN2,
                gradient_norm=float(norm),
                learning_rate=self.optimizers[-1].param_groups[0]["lr"],
                epochs=self.windows.epochs(self.step),
                seconds=self.seconds,
                tokens_per_second=self._throughput.tokens_per_second,
                peak_memory_mib=peak_memory_mib(self.device),
            )

    def _log_measurement(self, measurement: Measurement) -> None:
        self.last_measurement = measurement
        forward = float(measurement.composite["prefix_forward_gain_max"][-1])
        backward = float(measurement.composite["prefix_backward_gain_max"][-1])
        self.view.show_gain(forward, backward)
        self.log.write("monitor", measurement.step, **measurement.to_log(), monitor_seconds=measurement.seconds)
        if measurement.certificate is not None:
            self.log.write("certificate", measurement.step, **measurement.certificate.__dict__)

    def _validate(self) -> float:
        self._bits = self.evaluate(self.config.eval.num_bytes)
        self.log.write("eval", self.step, bits_per_byte=self._bits)
        self.view.say(f"step {self.step}: validation {self._bits:.3f} bits per byte")
        return self._bits

    def _check_finite(self, step: int, loss: Tensor, norm: Tensor) -> None:
        if math.isfinite(float(loss)) and math.isfinite(float(norm)):
            return
        saved = f"the checkpoint of step {self._saved_step} is intact" if self._saved_step >= 0 else "none is saved"
        raise NonFiniteLossError(
            f"step {step}: the loss is {float(loss)} and the gradient norm {float(norm)}; {saved}. Start again "
            "with a lower --optim.learning-rate or a longer --schedule.warmup-steps"
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: parameters, optimizer, counters, random states."""
        parameters, optimizer = checkpoint.model, checkpoint.optimizer
        in_place = self.config.parallel.tensor == self.config.parallel.pipeline == 1
        if checkpoint.shards is not None:
            own: dict[str, Tensor] = dict(self.engine.model.named_parameters())
            parameters, optimizer = restore_shards(checkpoint, own, in_place=in_place)
        if checkpoint.shards is None or not in_place:
            parameters, optimizer = self.engine.scatter(parameters), self.engine.scatter(optimizer)
            load_parameters(self.engine.model, parameters)
        load_optimizer_state(self.engine.model, self.optimizers, optimizer)
        self.step = self._saved_step = checkpoint.step
        self.seconds = float(checkpoint.progress["seconds"])
        self.monitor.seconds = float(checkpoint.progress.get("monitor_seconds", 0.0))
        self.monitor.setup_seconds = float(checkpoint.progress.get("monitor_setup_seconds", 0.0))
        self.first_bits = checkpoint.progress["first_bits_per_byte"]
        self._bits = checkpoint.progress["bits_per_byte"]
        restore_random_state(checkpoint.random)

    def _to_device(self, windows: np.ndarray) -> Tensor:
        tokens = torch.from_numpy(windows)
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens.long()

    def _anyone(self, wanted: bool) -> bool:
        """Say whether any process wants to stop, the same answer on all of them."""
        if self.world.size == 1:
            return wanted
        if self.step % self.config.log_every:
            return False
        flag = torch.tensor(int(wanted), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


@contextmanager
def _repeatable(wanted: bool) -> Iterator[None]:
    """Let torch take kernels whose sums have a fixed order only."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # cuDNN attention stays in use where this only warns
    settings.fill_uninitialized_memory = False  # memory that is written before it is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fills


def choose_device(name: str, world: World | None = None) -> torch.device:
    """Turn a configured device into one that exists here.

    Raises
    ------
    ValueError
        If it does not exist, or its name is unknown.

    Examples
    --------
    >>> from mhc_layers.training.loop import choose_device
    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no GPU here; use --device cpu or auto")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; accepted are 'auto', 'cpu' and 'cuda'")
    return torch.device(name, world.local_rank if world else 0) if name == "cuda" else torch.device(name)


def choose_precision(config: TrainConfig, device: torch.device) -> Precision:
    """Return the dtype of the streams: as configured; by default bfloat16 on a GPU and float32 on a CPU."""
    if config.stream_dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    else:
        dtype = getattr(torch, config.stream_dtype)
    return Precision(device_type=device.type, stream_dtype=dtype)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def peak_memory_mib(device: torch.device) -> float:
    """Return the highest memory use so far: of the device for a GPU, of the process for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
