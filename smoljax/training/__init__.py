"""State, step, loop and checkpoints."""

from smoljax.training.checkpoint import Checkpoints
from smoljax.training.config import TrainingConfig
from smoljax.training.description import describe
from smoljax.training.loop import train
from smoljax.training.run import Run
from smoljax.training.state import TrainState, make_state, state_shapes, state_shardings
from smoljax.training.step import loss_sum, make_eval_step, make_train_step

__all__ = [
    "Checkpoints",
    "Run",
    "TrainState",
    "TrainingConfig",
    "describe",
    "loss_sum",
    "make_eval_step",
    "make_state",
    "make_train_step",
    "state_shapes",
    "state_shardings",
    "train",
]
