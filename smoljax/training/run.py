"""From a config and a workdir to the pieces that training, evaluation and generation share."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.stages import Lowered

from smoljax import configuration, optim, parallel
from smoljax.errors import SmoljaxError
from smoljax.evaluation import perplexity
from smoljax.input_pipeline import Mixture, MixtureConfig, open_mixture
from smoljax.model import ModelConfig, logical_axes, param_shapes
from smoljax.tokens.config import TokenizerConfig
from smoljax.tokens.tokenizer import Tokenizer
from smoljax.training.checkpoint import Checkpoints
from smoljax.training.config import TrainingConfig
from smoljax.training.state import TrainState, state_shapes, state_shardings
from smoljax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: its settings, and the pieces made from them when first asked for.

    Attributes:
      config: the whole config, as plain nested dicts.
      workdir: the run's folder; shards, tokenizer and checkpoints are found below it unless the
        config names another place.
    """

    config: dict
    workdir: Path

    @property
    def seed(self) -> int:
        """Names the initial parameters and the data order."""
        return self.config.get("seed", 0)

    @functools.cached_property
    def model(self) -> ModelConfig:
        """The model, checked against the data that it reads."""
        model = self._section(ModelConfig, "model")
        seq_len = self.data.seq_len
        if seq_len > model.max_seq_len:
            raise SmoljaxError(
                f"config.data.seq_len is {seq_len}, longer than config.model.max_seq_len {model.max_seq_len}: "
                "raise the model's or shorten the data's"
            )
        return model

    @functools.cached_property
    def training(self) -> TrainingConfig:
        """The loop's settings."""
        training = self._section(TrainingConfig, "training")
        for size in self.data.batch_sizes.sizes:
            if size % training.micro_batches:
                raise SmoljaxError(
                    f"config.training.micro_batches is {training.micro_batches}, which does not divide a batch of "
                    f"{size} (config.data.batch_size, batch_ramp)"
                )
        return training

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices, arranged as config.mesh says."""
        return parallel.make_mesh(self._section(parallel.MeshConfig, "mesh"))

    @functools.cached_property
    def optimizer_config(self) -> optim.OptimizerConfig:
        """The optimizer's settings."""
        return self._section(optim.OptimizerConfig, "optimizer")

    @property
    def multipliers(self) -> dict[str, optim.Multipliers]:
        """Factors on rates, decays and eps by role, which follow from the model's size (muP, CompleteP)."""
        return self.model.multipliers(optim.update_rule(self.optimizer_config))

    @functools.cached_property
    def params_shapes(self) -> dict:
        """The parameters as ShapeDtypeStructs."""
        return param_shapes(self.model)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Gradient transformation for exactly these parameters."""
        return optim.build(
            self.optimizer_config,
            self.params_shapes,
            logical_axes=logical_axes(self.model),
            num_steps=self.training.num_steps,
            multipliers=self.multipliers,
            mesh=self.mesh,
            # Those that cut parameters come first: a matrix then moves along one axis after the other.
            mesh_axis=("fsdp", "tensor", "data", "context"),
        )

    @functools.cached_property
    def shapes(self) -> TrainState:
        """The training state as ShapeDtypeStructs."""
        return state_shapes(self.model, self.optimizer)

    @functools.cached_property
    def shardings(self) -> TrainState:
        """Where each leaf of the training state lives."""
        return state_shardings(self.mesh, self.model, self.shapes)

    @functools.cached_property
    def params_shardings(self) -> dict:
        """Where each parameter lives."""
        return parallel.param_shardings(self.mesh, logical_axes(self.model), self.params_shapes)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards."""
        settings = self._section(TokenizerConfig, "tokenizer")
        loaded = settings.load(self.workdir)
        if loaded.vocab_size > self.model.vocab_size:
            raise SmoljaxError(
                f"the tokenizer has {loaded.vocab_size} tokens, config.model.vocab_size is "
                f"{self.model.vocab_size}: make it at least {loaded.vocab_size}"
            )
        return loaded

    @functools.cached_property
    def data(self) -> MixtureConfig:
        """What is trained on, and in which order."""
        values = {"directory": str(self.workdir / "shards")} | {
            key: value for key, value in self.config.get("data", {}).items() if value != ""
        }
        return configuration.build(MixtureConfig, values | {"seed": self.seed}, "data")

    @functools.cached_property
    def mixture(self) -> Mixture:
        """The token shards, opened."""
        return open_mixture(
            dataclasses.replace(self.data, tokenizer_fingerprint=self.tokenizer.fingerprint)
        )

    def check_mesh(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises a SmoljaxError where the model or a batch does not divide over the mesh: before anything is made or compiled."""
        for size in self.data.batch_sizes.sizes:
            parallel.check_batch(
                mesh,
                batch_size=size,
                micro_batches=self.training.micro_batches,
                seq_len=self.data.seq_len,
            )
        parallel.param_shardings(mesh, logical_axes(self.model), self.params_shapes)

    def train_step(self) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
        """The compiled training step of these settings (see make_train_step)."""
        return make_train_step(
            self.model,
            self.optimizer,
            mesh=self.mesh,
            shardings=self.shardings,
            micro_batches=self.training.micro_batches,
            loss_chunk=self.training.loss_chunk,
            z_loss=self.training.z_loss,
            quantization=self.training.quantization,
            qk_clip_tau=self.optimizer_config.qk_clip_tau,
        )

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What a step reads of a batch of so many rows, as ShapeDtypeStructs with their places."""
        shape, sharding = (batch_size, self.data.seq_len), parallel.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, dtype in perplexity.BATCH_DTYPES.items()
        }

    def lower(self, train_step: Callable, batch: dict[str, jax.ShapeDtypeStruct]) -> Lowered:
        """`train_step` traced and lowered for such a batch. Nothing runs; a call with such arrays then does neither again, nor compiles
        what `compile()` of it did."""
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.shapes,
            self.shardings,
        )
        return train_step.lower(state, batch)

    @property
    def train_directory(self) -> Path:
        """Checkpoints, metrics and events."""
        return self.workdir / "train"

    def checkpoints(self) -> Checkpoints:
        """This run's checkpoints."""
        return Checkpoints(
            self.training.checkpoint_directory or self.train_directory / "checkpoints",
            keep=self.training.keep_checkpoints,
            model=self.model,
            config=self.config,
        )

    def restore_params(self) -> tuple[int, dict]:
        """(step, parameters) of the newest checkpoint: the averaged ones where the optimizer averages."""
        checkpoints = self.checkpoints()
        if optim.averages(self.optimizer_config):
            state = checkpoints.restore(self.shapes, self.shardings)
            params = optim.evaluation_params(state.opt_state, state.params)
        else:
            params = checkpoints.restore_params(self.params_shapes, self.params_shardings)
        step = checkpoints.latest_step()
        checkpoints.close()
        return step, params

    def _section(self, cls: type, name: str):
        return configuration.build(cls, self.config.get(name, {}), name)
