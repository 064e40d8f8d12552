"""How long, how often, in how many pieces: the `training` section of a config."""

import dataclasses

from smoljax.errors import SmoljaxError


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The training loop's settings.

    Attributes:
      num_steps: optimizer updates in all.
      micro_batches: pieces in which the gradient of a batch is accumulated.
      loss_chunk: tokens per device whose logits fill the memory that logits may take (smoljax.losses.cross_entropy).
      z_loss: weight of the squared log-normaliser.
      quantization: "int8", "int4" or "w8a8": training and evaluation round the weights as smoljax.interop.quantize does,
        so that the model learns to do with them (quantisation-aware training); "" does not round.
      log_every: steps between two rows of metrics.
      eval_every: steps between two held-out evaluations; the last step always has one.
      eval_batches: batches per source in an evaluation during training; the verb `evaluate` reads all.
      checkpoint_every: steps between two checkpoints; the last step always has one.
      keep_checkpoints: how many of the newest are kept.
      checkpoint_directory: a folder or gs:// URL that every host reaches; "" is WORKDIR/train/checkpoints.
    """

    num_steps: int
    micro_batches: int = 1
    loss_chunk: int = 4096
    z_loss: float = 0.0
    quantization: str = ""
    log_every: int = 10
    eval_every: int = 500
    eval_batches: int = 8
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    checkpoint_directory: str = ""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is str:
                continue
            value = getattr(self, field.name)
            least = 0 if field.name == "z_loss" else 1
            if value < least:
                raise SmoljaxError(
                    f"config.training.{field.name} is {value}; it must be at least {least}"
                )
