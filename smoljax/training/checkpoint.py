"""Orbax checkpoints: asynchronous, a few kept, refused when they are of another model."""

import contextlib
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from smoljax import configuration
from smoljax.errors import SmoljaxError
from smoljax.model import ModelConfig
from smoljax.model.config import EXECUTION
from smoljax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run, `directory/<step>/`.

    A checkpoint appears under its step number only when it is complete; one that was being written
    when the process died is cleaned away at the next start.

    Args:
      directory: local path or gs:// URL.
      keep: how many of the newest to keep.
      model: whose parameters they are; saved beside each state, and must match on restore (but for how it is run).
      config: the whole config, saved beside each state.
    """

    def __init__(self, directory: Path | str, *, keep: int, model: ModelConfig, config: dict):
        self._keep, self._model = keep, model
        self._metadata = json.loads(json.dumps({"model": model.as_section(), "config": config}))
        self._directory = epath.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def _ocp(self):
        """Orbax, imported when there is a checkpoint to read or to write: a new run's first step does not wait for it."""
        import orbax.checkpoint

        logging.getLogger("absl").setLevel(logging.WARNING)
        return orbax.checkpoint

    @functools.cached_property
    def _manager(self):
        return self._ocp.CheckpointManager(
            epath.Path(self._directory.resolve()),
            options=self._ocp.CheckpointManagerOptions(max_to_keep=self._keep),
            item_names=("state", "metadata"),
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step() if any(self._directory.iterdir()) else None

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host and goes on writing it in the background."""
        args = self._ocp.args
        with self._explained():
            self._manager.save(
                step,
                args=args.Composite(
                    state=args.StandardSave(state), metadata=args.JsonSave(self._metadata)
                ),
            )

    def restore(self, shapes: TrainState, shardings: TrainState | None = None) -> TrainState:
        """The newest state, each leaf read straight to its sharding.

        Args:
          shapes: the state of this run as ShapeDtypeStructs.
          shardings: where each leaf goes; the default device when None.

        Raises:
          SmoljaxError: there is none, it is of another model or optimizer, or it is damaged.
        """
        step = self.latest_step()
        if step is None:
            raise SmoljaxError(
                f"no checkpoint in {self._directory}: train first, or name the right --workdir"
            )
        place = self._directory / str(step)
        metadata = self._read_metadata(step)
        self._check_model(metadata["model"], place)
        target = _abstract(shapes, shardings)
        try:
            return self._restore_state(step, target)
        except SmoljaxError:
            raise
        except Exception as error:
            raise SmoljaxError(
                f"the checkpoint {place} cannot be read into this run's state: {_first_line(error)}. It was written with "
                "another optimizer or is damaged: restore the old config.optimizer, or remove that folder to go on "
                f"from an older step (present: {sorted(self._manager.all_steps())})"
            ) from error

    def restore_params(self, shapes: dict, shardings: dict | None = None) -> dict:
        """The parameters of the newest checkpoint alone, whatever optimizer wrote them."""
        ocp, step = self._ocp, self.latest_step()
        if step is None:
            raise SmoljaxError(
                f"no checkpoint in {self._directory}: train first, or name the right --workdir"
            )
        place = self._directory / str(step)
        self._check_model(self._read_metadata(step)["model"], place)
        target = {"params": _abstract(shapes, shardings)}
        restore = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        checkpointer = ocp.PyTreeCheckpointer()
        try:
            return checkpointer.restore(epath.Path(place.resolve()) / "state", args=restore)[
                "params"
            ]
        except Exception as error:
            raise SmoljaxError(
                f"the checkpoint {place} is damaged: {_first_line(error)}. Remove that folder to use an older step "
                f"(present: {sorted(self._manager.all_steps())})"
            ) from error

    def wait(self) -> None:
        """Blocks until everything that was saved is on disk; raises what went wrong in the background."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written, then lets go of the folder."""
        self._manager.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise their own kinds.
            reason = "the disk is full" if "No space left" in str(error) else _first_line(error)
            raise SmoljaxError(
                f"a checkpoint could not be written to {self._directory}: {reason}. Older checkpoints are whole "
                f"(steps {sorted(self._manager.all_steps())}): mend that and run the same command again"
            ) from error

    def _restore_state(self, step: int, target: TrainState) -> TrainState:
        args = self._ocp.args
        restored = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(target))
        )
        return TrainState(*restored["state"])

    def _read_metadata(self, step: int) -> dict:
        args = self._ocp.args
        return self._manager.restore(step, args=args.Composite(metadata=args.JsonRestore()))[
            "metadata"
        ]

    def _check_model(self, saved: dict, place: epath.Path) -> None:
        # By way of ModelConfig, so that a field that is younger than the checkpoint has its default.
        saved = configuration.build(ModelConfig, saved, "model").as_section()
        wanted = self._model.as_section()
        different = [
            name for name in wanted if name not in EXECUTION and saved[name] != wanted[name]
        ]
        if different:
            name = different[0]
            raise SmoljaxError(
                f"the checkpoint {place} is of another model: its {name} is {saved[name]!r}, "
                f"config.model.{name} is {wanted[name]!r}"
                f"{f' (also different: {different[1:]})' if different[1:] else ''}. "
                "Use the config it was written with, or a new --workdir"
            )


def _abstract(shapes: object, shardings: object | None) -> object:
    if shardings is None:
        return shapes
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
