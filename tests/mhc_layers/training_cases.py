"""Small configurations that the training tests share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mhc_layers.config import TransformerConfig
from mhc_layers.training.config import CheckpointConfig, DataConfig, EvalConfig, MonitorConfig, TrainConfig
from mhc_layers.training.optim import OptimConfig
from mhc_layers.training.schedule import ScheduleConfig


def write_text(folder: Path, *, files: int = 30, lines: int = 40) -> Path:
    """Write a folder of small, regular, distinct text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        text = "".join(f"value_{index}_{line} = {line * index % 97}\n" for line in range(lines))
        (folder / f"module_{index}.py").write_text(text, encoding="utf-8")
    return folder


def tiny_model(**changes: Any) -> TransformerConfig:
    """A model of a few thousand parameters."""
    fields = {"vocab_size": 256, "dim": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 64, "num_streams": 4}
    return TransformerConfig(**{**fields, **changes})


def tiny_config(data: Path, **changes: Any) -> TrainConfig:
    """A run of seconds on one CPU thread."""
    config = TrainConfig(
        model=tiny_model(),
        name="test",
        steps=12,
        device="cpu",
        threads=1,
        log_every=2,
        data=DataConfig(path=data, seq_len=16, batch_size=4, held_out=0.2),
        optim=OptimConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=3),
        eval=EvalConfig(every=4, num_bytes=256, final_bytes=512, sample_bytes=8),
        monitor=MonitorConfig(every=2, certify_every=4, tokens=8),
        checkpoint=CheckpointConfig(every=5, keep=2),
    )
    return dataclasses.replace(config, **changes)
