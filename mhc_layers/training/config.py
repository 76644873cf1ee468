"""What a run is: frozen values that a recipe builds, the command line overrides, and a run directory keeps as JSON."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mhc_layers.config import TransformerConfig
from mhc_layers.parallel.mesh import ParallelConfig
from mhc_layers.training.optim import OptimConfig
from mhc_layers.training.schedule import ScheduleConfig

__all__ = ["CheckpointConfig", "DataConfig", "EvalConfig", "MonitorConfig", "TrainConfig", "decode", "encode"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is read, and in what pieces.

    Parameters
    ----------
    path : pathlib.Path, optional
        A file or a folder; without it, the source of the running Python's standard library.
    suffixes : tuple of str
        In a folder, only files that end so; empty means every text file.
    held_out : float
        Share of the files that is kept for validation.
    seq_len : int
        Bytes of context of a sequence.
    batch_size : int
        Sequences of one step, over all processes.
    micro_batch_size : int
        Sequences of one forward pass of one process; 0 means all of its share. Gradients are summed over the passes.
    """

    path: Path | None = None
    suffixes: tuple[str, ...] = ()
    held_out: float = 0.05
    seq_len: int = 128
    batch_size: int = 16
    micro_batch_size: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"data.held_out is {self.held_out}; it is a share between 0 and 1, such as 0.05")
        for name in ("seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.micro_batch_size < 0:
            raise ValueError(f"data.micro_batch_size is {self.micro_batch_size}; it must be 0 (all) or more")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and on how much held-out text the model is evaluated, and what it writes at the end.

    Parameters
    ----------
    every : int
        Steps between validations.
    num_bytes : int
        Held-out bytes of a validation during the run.
    final_bytes : int
        Held-out bytes of the validation at the end.
    prompt : str
        Start of the text that the trained model continues.
    sample_bytes : int
        Length of that text.
    temperature : float
        Temperature of the sampling; 0 takes the most likely byte.
    """

    every: int = 100
    num_bytes: int = 16_384
    final_bytes: int = 65_536
    prompt: str = "def "
    sample_bytes: int = 256
    temperature: float = 0.7

    def __post_init__(self) -> None:
        for name in ("every", "num_bytes", "final_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.sample_bytes < 0 or self.temperature < 0.0:
            raise ValueError(
                f"eval.sample_bytes is {self.sample_bytes}, eval.temperature {self.temperature}; both must be >= 0"
            )


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """How often the connections are measured and certified.

    Parameters
    ----------
    every : int
        Steps between measurements of the coefficients; 0 turns them off.
    certify_every : int
        Steps between certificates of the whole depth's composite; 0 turns them off. A multiple of ``every``.
    tokens : int
        Tokens of a step that are measured.
    """

    every: int = 20
    certify_every: int = 100
    tokens: int = 64

    def __post_init__(self) -> None:
        if self.every < 0 or self.certify_every < 0 or self.tokens < 1:
            raise ValueError(
                f"monitor is every={self.every}, certify_every={self.certify_every}, tokens={self.tokens}; the "
                "intervals must be 0 (off) or more, tokens 1 or more"
            )
        if self.certify_every and (self.every == 0 or self.certify_every % self.every):
            raise ValueError(
                f"monitor.certify_every is {self.certify_every}; it must be a multiple of monitor.every "
                f"({self.every}), because a certificate uses the coefficients of a measured step"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept.

    Parameters
    ----------
    every : int
        Steps between checkpoints; one is always written at the end and on interruption.
    keep : int
        Newest checkpoints that are kept.
    format : {"auto", "whole", "sharded"}
        ``whole``: the main process gathers everything and writes it. ``sharded``: every process writes its part; any
        number of processes can read it. ``auto`` is sharded where ``parallel.shard`` is not 1.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    every: int = 200
    keep: int = 2
    format: Literal["auto", "whole", "sharded"] = "auto"

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every is {self.every}, keep is {self.keep}; both must be 1 or more")
        if self.format not in ("auto", "whole", "sharded"):
            raise ValueError(f"checkpoint.format is {self.format!r}; accepted are 'auto', 'whole' and 'sharded'")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run.

    Parameters
    ----------
    model : mhc_layers.TransformerConfig
        The model; ``vocab_size`` is 256, one token per byte.
    name : str
        Name of the recipe, used for the run directory.
    steps : int
        Optimizer steps.
    seed : int
        Seed of parameters, data order and sampling.
    device : str
        "auto" (a GPU where there is one), "cpu" or "cuda".
    stream_dtype : {"auto", "float32", "bfloat16"}
        Dtype of the streams and sublayers; parameters and optimizer state stay fp32. "auto" is bfloat16 on a GPU.
    threads : int
        CPU threads of a process; 0 leaves the choice to torch.
    compile : bool
        Compile the model with ``torch.compile``.
    deterministic : bool
        On a GPU, take kernels whose sums have a fixed order, so that a resumed run has the same bits. On a CPU they
        always have.
    log_every : int
        Steps between lines in the metrics file.
    data, eval, optim, schedule, monitor, checkpoint, parallel
        The parts.

    Raises
    ------
    ValueError
        If parts contradict each other; the message says which and how to solve it.
    """

    model: TransformerConfig
    name: str = "custom"
    steps: int = 1000
    seed: int = 0
    device: str = "auto"
    stream_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = 0
    compile: bool = False
    deterministic: bool = True
    log_every: int = 10
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.log_every < 1:
            raise ValueError(f"steps is {self.steps}, log_every {self.log_every}; both must be 1 or more")
        if not self.name or self.name != Path(self.name).name:
            raise ValueError(f"name is {self.name!r}; it names the run directory, so it must be a word without slashes")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more and below 2^63")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}; it must be 0 (torch's choice) or more")
        if self.model.vocab_size != 256:
            raise ValueError(
                f"model.vocab_size is {self.model.vocab_size}; the training data are bytes, so it must be 256"
            )
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len is {self.data.seq_len}, more than model.max_seq_len {self.model.max_seq_len}; lower the "
                "first or raise the second"
            )
        prompt = 1 + len(self.eval.prompt.encode())
        if self.eval.sample_bytes and prompt >= self.model.max_seq_len:
            raise ValueError(
                f"eval.prompt has {prompt} bytes with the document start, which leaves no room in model.max_seq_len "
                f"{self.model.max_seq_len}; shorten it, or set eval.sample_bytes to 0"
            )
        if self.stream_dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"stream_dtype is {self.stream_dtype!r}; accepted are 'auto', 'float32' and 'bfloat16'")
        if self.checkpoint.format == "sharded" and (self.parallel.tensor > 1 or self.parallel.pipeline > 1):
            raise ValueError(
                f"checkpoint.format is 'sharded' with parallel.tensor {self.parallel.tensor} and parallel.pipeline "
                f"{self.parallel.pipeline}; shards are written for copied and FSDP2-sharded parameters. Set both to 1, "
                "or the format to 'whole'"
            )
        if self.optim.kind == "muon" and (self.parallel.shards or self.parallel.tensor > 1):
            raise ValueError(
                f"optim.kind is 'muon' with parallel.shard {self.parallel.shard} and parallel.tensor "
                f"{self.parallel.tensor}; Muon orthogonalises whole matrices and these axes split them. Set both to 1, "
                "or optim.kind to 'adamw'"
            )

    @property
    def sharded_checkpoints(self) -> bool:
        """Whether every process writes its part of a checkpoint."""
        chosen = self.checkpoint.format
        return chosen == "sharded" or (chosen == "auto" and self.parallel.shards)


def encode(value: Any) -> Any:
    """Turn nested dataclasses into JSON values.

    Examples
    --------
    >>> from mhc_layers.training.config import DataConfig, encode
    >>> from pathlib import Path
    >>> encode(DataConfig(path=Path("text"), seq_len=64))["seq_len"]
    64
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: encode(getattr(value, item.name)) for item in dataclasses.fields(value) if item.init}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value


def decode(kind: type[T], value: Any, *, where: str = "config") -> T:
    """Build a dataclass of type ``kind`` from the JSON values of :func:`encode`.

    Raises
    ------
    ValueError
        If a field is unknown, missing or of the wrong type; the message names its place.

    Examples
    --------
    >>> from mhc_layers.training.config import CheckpointConfig, decode
    >>> decode(CheckpointConfig, {"every": 5, "keep": 1})
    CheckpointConfig(every=5, keep=1, format='auto')
    """
    return typing.cast(T, _decode(kind, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_fields(kind, value, where)
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(kind), value, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{where} is {value!r}; accepted are {', '.join(map(repr, get_args(kind)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}; a list is expected")
        item_kinds = get_args(kind)
        if len(item_kinds) == 2 and item_kinds[1] is Ellipsis:
            item_kinds = (item_kinds[0],) * len(value)
        if len(item_kinds) != len(value):
            raise ValueError(f"{where} has {len(value)} items; {len(item_kinds)} are expected")
        return tuple(_decode(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(item_kinds, value, strict=True)))
    if kind is Path:
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (bool, int, float, str, type(None)) and type(value) is not kind:
        raise ValueError(f"{where} is {value!r}; {kind.__name__} is expected")
    return value


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}; an object with the fields of {kind.__name__} is expected")
    hints = get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind) if item.init}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}; it was written by another version")
    return kind(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    messages = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _decode(kind, value, where)
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    raise ValueError("; ".join(messages))
