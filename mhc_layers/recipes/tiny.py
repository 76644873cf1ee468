"""Recipes for a laptop or a CI machine."""

from __future__ import annotations

from mhc_layers.config import TransformerConfig
from mhc_layers.training.config import CheckpointConfig, DataConfig, EvalConfig, MonitorConfig, TrainConfig
from mhc_layers.training.optim import OptimConfig
from mhc_layers.training.schedule import ScheduleConfig

__all__ = ["tiny_cpu"]


def tiny_cpu() -> TrainConfig:
    """Return a byte-level model that learns Python source on two CPU cores in under four minutes."""
    return TrainConfig(
        name="tiny_cpu",
        model=TransformerConfig(vocab_size=256, dim=128, num_layers=4, num_heads=4, max_seq_len=512),
        steps=600,
        data=DataConfig(seq_len=128, batch_size=16),
        optim=OptimConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(warmup_steps=50),
        eval=EvalConfig(every=150),
        monitor=MonitorConfig(every=20, certify_every=100),
        checkpoint=CheckpointConfig(every=200),
    )
