"""Training: the step of any loop (`steps`), and the job's loop (`loop`), its log (`log`) and evaluation (`evaluation`).

The last three need what only the job does: a data set, checkpoints, several processes.
"""

from ddnp_jax.training.steps import (
    Batch,
    Distillation,
    Metrics,
    Step,
    TrainState,
    chunk_of,
    init_state,
    recalibration_step,
    schedule,
    sgd,
    step_rngs,
    train_step,
)

__all__ = [
    "Batch",
    "Distillation",
    "Metrics",
    "Step",
    "TrainState",
    "chunk_of",
    "init_state",
    "recalibration_step",
    "schedule",
    "sgd",
    "step_rngs",
    "train_step",
]
