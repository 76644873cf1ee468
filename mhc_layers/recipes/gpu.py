"""Recipes for one GPU and for several GPUs of one machine. Start the latter with ``torchrun --nproc-per-node N``."""

from __future__ import annotations

from mhc_layers.config import TransformerConfig
from mhc_layers.parallel.mesh import ParallelConfig
from mhc_layers.training.config import CheckpointConfig, DataConfig, EvalConfig, MonitorConfig, TrainConfig
from mhc_layers.training.optim import OptimConfig
from mhc_layers.training.schedule import ScheduleConfig

__all__ = ["medium_ddp", "medium_fsdp", "medium_pipeline", "small_gpu"]


def small_gpu() -> TrainConfig:
    """Return a byte-level model of about 40 million parameters for one GPU, bf16 streams."""
    return TrainConfig(
        name="small_gpu",
        model=TransformerConfig(vocab_size=256, dim=512, num_layers=12, num_heads=8, max_seq_len=1024),
        steps=2000,
        data=DataConfig(seq_len=1024, batch_size=32),
        optim=OptimConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=100),
        eval=EvalConfig(every=250, num_bytes=262_144, final_bytes=1_048_576),
        monitor=MonitorConfig(every=50, certify_every=250),
        checkpoint=CheckpointConfig(every=500),
    )


def medium_ddp() -> TrainConfig:
    """Return a model of about 300 million parameters, copied to every GPU (DDP); any number of GPUs that divides 64."""
    return _medium("medium_ddp", ParallelConfig(recompute="auto"))


def medium_fsdp() -> TrainConfig:
    """Return the same model with its parameters sharded over all GPUs (FSDP2); any number that divides 64."""
    return _medium("medium_fsdp", ParallelConfig(shard=0, recompute="auto"))


def medium_pipeline() -> TrainConfig:
    """Return the same model in 4 pipeline stages, and two replicas of them, on 8 GPUs."""
    return _medium("medium_pipeline", ParallelConfig(pipeline=4, recompute="auto", micro_batches=8))


def _medium(name: str, parallel: ParallelConfig) -> TrainConfig:
    return TrainConfig(
        name=name,
        model=TransformerConfig(
            vocab_size=256, dim=1024, num_layers=24, num_heads=16, num_kv_heads=8, max_seq_len=2048
        ),
        steps=5000,
        data=DataConfig(seq_len=2048, batch_size=64),
        optim=OptimConfig(learning_rate=6e-4),
        schedule=ScheduleConfig(kind="step", warmup_steps=200),
        eval=EvalConfig(every=500, num_bytes=1_048_576, final_bytes=1_048_576),
        monitor=MonitorConfig(every=100, certify_every=500),
        checkpoint=CheckpointConfig(every=500),
        parallel=parallel,
    )
