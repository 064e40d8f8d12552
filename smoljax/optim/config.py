"""The optimizer's settings, and what follows from them for each role and each step."""

import dataclasses
from collections.abc import Mapping

from smoljax.errors import SmoljaxError
from smoljax.optim import schedules
from smoljax.optim.hyperparameters import check_number, check_whole
from smoljax.optim.muon import SCALES
from smoljax.optim.newton_schulz import coefficient_rows
from smoljax.optim.parametrization import Multipliers
from smoljax.optim.partition import Treatment, treatment_of

# Optimizers of the hidden matrices; AdamW has the other roles.
MATRIX_OPTIMIZERS = ("muon", "normuon", "adamuon", "soap", "muonh", "adamh")
# Optimizers of every role.
ELEMENT_OPTIMIZERS = ("adamw", "lion", "adafactor", "schedule_free")
NAMES = (*ELEMENT_OPTIMIZERS, *MATRIX_OPTIMIZERS)
# These keep each matrix at its first norm, so that weight decay has nothing to do, and their rates are relative.
ON_THE_SPHERE = ("muonh", "adamh")

SCHEDULES = ("wsd", "cyclic_wsd", "cosine", "linear", "inverse_sqrt", "constant")
CLIPS = ("global_norm", "adagc", "zclip")
AVERAGES = ("", "ema", "tail")
ROLES = ("hidden", "embedding", "head", "norm")
# What config.optimizer.groups can set for a role.
GROUP_FIELDS = (
    "learning_rate",
    "weight_decay",
    "schedule",
    "warmup_steps",
    "decay_steps",
    "decay_fraction",
    "decay_start",
    "decay_tail",
    "decay_power",
    "num_cycles",
    "final_fraction",
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What `build` needs to know. The defaults are SmolLM3's, and with name="muon" they hold as they are.

    Every learning rate below is a peak: the rate of a leaf at a step is the schedule's share of the peak at that step (0
    to 1) times the peak of its group. Weight decay is multiplied by that same rate.

    Attributes:
      name: the optimizer of all parameters ("adamw", "lion", "adafactor", "schedule_free": AdamW without a schedule), or of
        the hidden matrices beside AdamW for embedding, head and norms ("muon", "normuon", "adamuon", "soap", and with a
        fixed norm "muonh", "adamh", whose learning rate is the share of the norm that a step moves, near 0.02).
      learning_rate: peak rate of the optimizer that `name` says.
      adamw_learning_rate: peak rate of the leaves that AdamW keeps beside a matrix optimizer. None: learning_rate, right for
        scale "rms".
      groups: role to fields of its own ("learning_rate", "weight_decay", "schedule" and the schedule's fields):
        {"embedding": {"learning_rate": 3e-3, "schedule": "cosine"}}. A role of your own rules needs an entry here.
      b1, b2, eps: AdamW's moments (Lion's too, but eps).
      weight_decay: decoupled decay, of all roles but no_decay_roles.
      no_decay_roles: roles without decay. SmolLM3 decays everything, norms too, except the embedding.
      weight_decay_schedule: "constant", or "learning_rate": the decay falls and rises with the rate's share of its peak.
      cautious_weight_decay: decay only the entries that the update moves towards zero too (arXiv 2510.12402).
      clip: how gradients are clipped: "global_norm" at clip_norm, "adagc" each tensor against its own past, "zclip" the
        global norm against its own past.
      clip_norm: "global_norm": largest global gradient norm; None never clips. "adagc": the same during its warmup.
      centralize_gradients: take the mean over the inputs from each hidden matrix's gradient (arXiv 2004.01461).
      normalize_gradients: scale the gradient of each tensor, in each layer, to RMS 1.
      skip_spikes: leave out steps whose loss or gradient norm lies far outside of the last 128.
      momentum: beta of Muon and its kin, and of SOAP.
      nesterov: whether Muon looks one gradient ahead.
      matrix_b2: decay of the second moment in NorMuon and SOAP.
      scale: Muon's and NorMuon's "rms", "spectral" or "keller"; the last two need a learning_rate near 0.02.
      coefficients: Newton-Schulz coefficients by name, or rows (a, b, c).
      newton_schulz_steps: number of steps.
      newton_schulz_dtype: "float32" or "bfloat16"; None: bfloat16 on accelerators, float32 on a CPU.
      momentum_dtype: dtype of Muon's momentum: "float32" or "bfloat16".
      heads_per_matrix: attention kernels are orthogonalised in matrices of so many heads; None: all heads in one.
      precondition_every: SOAP: steps between two refreshes of the basis.
      qk_clip_tau: after the update, scale down query and key kernels of heads whose largest attention logit was above this
        (MuonClip: 100); None never does.
      schedule: "wsd", "cyclic_wsd", "cosine", "linear", "inverse_sqrt" or "constant".
      warmup_steps: steps from rate 0 to the peak ("inverse_sqrt": its time scale too).
      decay_steps: "wsd": length of the decay; None: decay_fraction of all steps (of a cycle's, with "cyclic_wsd").
      decay_fraction: "wsd": length of the decay as a share of all steps.
      decay_start: "wsd": last step at the peak; None: the decay ends with the last step.
      decay_tail: "wsd": "linear", "cosine", "1-sqrt" or "power".
      decay_power: exponent of the tail "power".
      num_cycles: "cyclic_wsd": how many times warmup, stable and decay are run through.
      final_fraction: rate at the end, as a share of the peak.
      average: "ema" or "tail": keep an average of the weights, which evaluation uses; "" keeps none. (It sees the weights
        before a QK-clip of the same step.)
      average_decay: "ema": share of the average that stays at each step.
      average_start: updates before the average begins; None: "ema" from the first, "tail" from the decay's start.
      metrics: measure every leaf's update (RMS, ratio to the weight; for Muon also orthogonality and momentum).
    """

    name: str = "adamw"
    learning_rate: float = 2e-4
    adamw_learning_rate: float | None = None
    groups: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay_roles: tuple[str, ...] = ("embedding",)
    weight_decay_schedule: str = "constant"
    cautious_weight_decay: bool = False
    clip: str = "global_norm"
    clip_norm: float | None = 1.0
    centralize_gradients: bool = False
    normalize_gradients: bool = False
    skip_spikes: bool = False
    momentum: float = 0.95
    nesterov: bool = True
    matrix_b2: float = 0.95
    scale: str = "rms"
    coefficients: str | tuple = "polar_express"
    newton_schulz_steps: int = 5
    newton_schulz_dtype: str | None = None
    momentum_dtype: str = "float32"
    heads_per_matrix: int | None = None
    precondition_every: int = 10
    qk_clip_tau: float | None = None
    schedule: str = "wsd"
    warmup_steps: int = 0
    decay_steps: int | None = None
    decay_fraction: float = 0.1
    decay_start: int | None = None
    decay_tail: str = "linear"
    decay_power: float = 1.2
    num_cycles: int = 1
    final_fraction: float = 0.0
    average: str = ""
    average_decay: float = 0.999
    average_start: int | None = None
    metrics: bool = False

    def __post_init__(self):
        _choice("name", self.name, NAMES)
        _choice("weight_decay_schedule", self.weight_decay_schedule, ("constant", "learning_rate"))
        _choice("clip", self.clip, CLIPS)
        _choice("scale", self.scale, tuple(SCALES))
        _choice("schedule", self.schedule, SCHEDULES)
        _choice("decay_tail", self.decay_tail, tuple(schedules.TAILS))
        _choice("newton_schulz_dtype", self.newton_schulz_dtype, (None, "float32", "bfloat16"))
        _choice("momentum_dtype", self.momentum_dtype, ("float32", "bfloat16"))
        _choice("average", self.average, AVERAGES)
        for role in self.no_decay_roles:
            _choice("no_decay_roles", role, ROLES)
        coefficient_rows(self.coefficients, self.newton_schulz_steps)
        for field in ("learning_rate", "adamw_learning_rate", "clip_norm", "qk_clip_tau"):
            self._check(field, above=0)
        for field in ("b1", "b2", "momentum", "matrix_b2", "average_decay"):
            self._check(field, at_least=0, below=1)
        for field in ("weight_decay", "eps"):
            self._check(field, at_least=0)
        self._check("decay_power", above=0)
        for field in ("heads_per_matrix", "precondition_every", "num_cycles"):
            self._check_whole(field, at_least=1)
        for field in ("warmup_steps", "decay_steps", "decay_start", "average_start"):
            self._check_whole(field, at_least=0)
        for field in ("decay_fraction", "final_fraction"):
            self._check(field, at_least=0, at_most=1)
        for role in self.groups:
            self.of_group(role)
        # Schedule-free moves another point than the one that is evaluated; on the sphere, what a clip takes from one head
        # the next step gives back to all.
        refused = {"schedule_free": ("average", "qk_clip_tau")} | dict.fromkeys(
            ON_THE_SPHERE, ("qk_clip_tau",)
        )
        for field in refused.get(self.name, ()):
            if getattr(self, field):
                raise SmoljaxError(
                    f"config.optimizer.{field} is {getattr(self, field)!r}, which {self.name} cannot have: unset it"
                )

    def _check(self, field: str, **bounds: float) -> None:
        if getattr(self, field) is not None:
            check_number(f"config.optimizer.{field}", getattr(self, field), **bounds)

    def _check_whole(self, field: str, *, at_least: int) -> None:
        if getattr(self, field) is not None:
            check_whole(f"config.optimizer.{field}", getattr(self, field), at_least=at_least)

    def of_group(self, role: str) -> "OptimizerConfig":
        """These settings with what `groups` says of a role.

        Raises:
          SmoljaxError: a field that a group cannot set, or a value that it cannot have.
        """
        fields = dict(self.groups.get(role, {}))
        for field in fields:
            _choice(f"groups.{role}", field, GROUP_FIELDS)
        return dataclasses.replace(self, groups={}, **fields)


def treatments(
    config: OptimizerConfig, multipliers: Mapping[str, Multipliers] | None = None
) -> dict[str, Treatment]:
    """The table from role to optimizer, peak rate, decay and schedule that `build` follows.

    Args:
      config: the settings.
      multipliers: factors on rate, decay and eps by role (smoljax.optim.multipliers: muP, CompleteP); None is all ones.
    """
    table = {}
    for role in (*ROLES, *(role for role in config.groups if role not in ROLES)):
        group = config.of_group(role)
        optimizer, peak = config.name, group.learning_rate
        if config.name in MATRIX_OPTIMIZERS and role != "hidden":
            optimizer = "adamw"
            if "learning_rate" not in config.groups.get(role, {}):
                peak = config.adamw_learning_rate or config.learning_rate
        decay = group.weight_decay
        stays = role in config.no_decay_roles and "weight_decay" not in config.groups.get(role, {})
        if stays or optimizer in ON_THE_SPHERE:
            decay = 0.0
        factors = multipliers.get(role) if multipliers else None
        table[role] = Treatment(
            optimizer=optimizer,
            learning_rate=peak * factors.learning_rate if factors else peak,
            weight_decay=decay * factors.weight_decay if factors else decay,
            eps=config.eps * factors.eps if factors else config.eps,
            schedule=group.schedule,
        )
    return table


def averages(config: OptimizerConfig) -> bool:
    """Whether the optimizer's state holds the weights to evaluate with (see evaluation_params)."""
    return bool(config.average) or config.name == "schedule_free"


def update_rule(config: OptimizerConfig) -> str:
    """How the hidden matrices' updates grow with their size: the `rule` of smoljax.optim.multipliers."""
    if config.name in ON_THE_SPHERE:
        return "muon_spectral"  # A share of the norm stays one at any width.
    if config.name in ("muon", "normuon"):
        return f"muon_{config.scale}"
    if config.name == "adamuon":
        return "muon_rms"
    return "adamw"  # Entries of about one size, whatever the gradient's.


def learning_rate_schedule(
    config: OptimizerConfig,
    num_steps: int,
    *,
    role: str = "hidden",
    multipliers: Mapping[str, Multipliers] | None = None,
) -> schedules.Schedule:
    """The rate of a role's leaves by step (from 0).

    Args:
      config: the settings.
      num_steps: steps of the whole run.
      role: whose schedule.
      multipliers: as in treatments.

    Raises:
      SmoljaxError: the schedule does not fit num_steps.
    """
    peak = treatment_of(role, treatments(config, multipliers)).learning_rate
    group = config.of_group(role)
    options = {"warmup_steps": group.warmup_steps}
    if config.name == "schedule_free" or group.schedule == "constant":
        return schedules.constant(peak, **options)
    if group.schedule == "inverse_sqrt":
        return schedules.inverse_sqrt(peak, **options)
    options["final_fraction"] = group.final_fraction
    if group.schedule in ("cosine", "linear"):
        make = {"cosine": schedules.cosine, "linear": schedules.linear}[group.schedule]
        return make(peak, num_steps=num_steps, **options)
    options |= {"tail": group.decay_tail, "power": group.decay_power}
    if group.schedule == "cyclic_wsd":
        cycle_steps = num_steps // group.num_cycles
        return schedules.cyclic_wsd(
            peak,
            cycle_steps=cycle_steps,
            decay_steps=_decay_steps(group, cycle_steps),
            **options,
        )
    return schedules.wsd(
        peak,
        decay_start=decay_start(group, num_steps),
        decay_steps=_decay_steps(group, num_steps),
        **options,
    )


def decay_start(config: OptimizerConfig, num_steps: int) -> int:
    """The last step at the peak of a "wsd" schedule."""
    if config.decay_start is not None:
        return config.decay_start
    return num_steps - _decay_steps(config, num_steps)


def _decay_steps(config: OptimizerConfig, num_steps: int) -> int:
    if config.decay_steps is not None:
        return config.decay_steps
    return round(config.decay_fraction * num_steps)


def _choice(field: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise SmoljaxError(
            f"config.optimizer.{field} is {value!r}: choose one of {', '.join(map(repr, choices))}"
        )
