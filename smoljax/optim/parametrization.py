"""How initial values, rates and factors of the forward pass follow a model's size, so that a small model is tuned for a large one.

In short, for n times the width and m times the depth of the model that was tuned (the base):

  init std of hidden matrices   n^-1/2      n inputs add up with random signs
  their learning rate, AdamW    n^-1        an update adds up over n inputs with one sign
                       Muon     1, n^-1/2   scale "spectral", "rms" (see _HIDDEN_RATE)
  their weight decay            1 / rate    smoljax multiplies the decay by the rate, and the product stays
  logits                        n^-1        as the rate of AdamW; the head's (or tied table's) own rate stays
  Adam's eps                    n^-1 m^-1   so do the gradients, by the two forward factors
  attention logits              1/H         a query agrees with its key, so products of H add up with one sign
  residual branches (CompleteP) m^-1        m times as many move the stream in one direction

"mup": Yang et al. 2022, arXiv 2203.03466, which says nothing of depth. "completep": Dey et al. 2025, arXiv 2505.01618, Table 1
with alpha = 1; eps of embedding and head follows equation 40. Muon's columns are derived from the spectral condition,
|dW|_op ~ sqrt(d_out / d_in) (Yang, Simon, Bernstein 2023, arXiv 2310.17813). At the base size every number here is 1.

Needs nothing but Python's standard library.
"""

import math
import numbers
from typing import NamedTuple

from smoljax.errors import SmoljaxError

KINDS = ("standard", "mup", "completep")

# The power of the width that the learning rate of a hidden matrix follows. An update dW = rate * scale * O changes
# the outputs of RMS-1 inputs by |dW|_op * sqrt(d_in / d_out), which has to stay, whatever the width.
_HIDDEN_RATE = {
    # Entries of one size that agree with the inputs: |dW|_op = rate * sqrt(d_in d_out), so rate * d_in stays.
    "adamw": -1.0,
    # |O|_op = 1 and the scale is sqrt(d_out / d_in): the rate itself stays. So for sqrt(max(1, d_out / d_in)), as long as
    # d_out / d_in stays.
    "muon_spectral": 0.0,
    "muon_keller": 0.0,
    # The scale is 0.2 sqrt(max(d_in, d_out)): rate * sqrt(width) stays.
    "muon_rms": -0.5,
}
UPDATE_RULES = tuple(_HIDDEN_RATE)


class Multipliers(NamedTuple):
    """What the numbers of one role are multiplied by, relative to the base model.

    Attributes:
      init_std: standard deviation of the initial values.
      learning_rate: the peak.
      weight_decay: the strength of a decay that is multiplied by the learning rate (as smoljax's and optax's are).
      eps: Adam's.
    """

    init_std: float = 1.0
    learning_rate: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


class ForwardMultipliers(NamedTuple):
    """Factors inside the model, relative to the base model.

    Attributes:
      residual: on the output of every residual branch before it is added: x + residual * f(x).
      readout: on the logits (or on the hidden state that they are made of).
      attention: on the usual H^-1/2 of attention's logits.
    """

    residual: float = 1.0
    readout: float = 1.0
    attention: float = 1.0


def multipliers(
    kind: str, *, width: float, depth: float = 1.0, rule: str = "adamw"
) -> dict[str, Multipliers]:
    """The table from role to Multipliers, to be used with the factors of forward_multipliers.

    It supposes that all hidden widths (model, heads, feed-forward) grow alike. Whether a role decays at all is the recipe's
    choice (CompleteP's own code leaves out norms and biases); this says how the strength follows the size.

    Args:
      kind: "standard" (all 1), "mup" or "completep".
      width: hidden size, as a multiple of the base model's.
      depth: number of layers, as a multiple of the base model's; only "completep" looks at it.
      rule: what updates the hidden matrices: "adamw", or "muon_" and the name of Muon's scale. All else is AdamW's.

    Returns:
      Roles "hidden", "embedding", "head" (the matrix before the logits, when it is not the embedding), "norm" and "bias",
      the last two of the layers. (The final norm's eps may follow the embedding's; a smaller one does no harm.)

    Raises:
      SmoljaxError: an unknown kind or rule, or a size that is not a positive number.
    """
    _check(kind, width=width, depth=depth)
    if rule not in _HIDDEN_RATE:
        raise SmoljaxError(f"rule is {rule!r}: choose one of {', '.join(UPDATE_RULES)}")
    if kind == "standard":
        return dict.fromkeys(("hidden", "embedding", "head", "norm", "bias"), Multipliers())
    residual = forward_multipliers(kind, width=width, depth=depth).residual
    rate = width ** _HIDDEN_RATE[rule]
    # The gradient of what lies outside the residual branches, and of what lies inside.
    outside, inside = 1 / width, residual / width
    return {
        "hidden": Multipliers(
            init_std=width**-0.5,
            learning_rate=rate,
            weight_decay=1 / rate,
            # Muon's own eps stands beside a Frobenius norm and not an entry: nothing to follow.
            eps=inside if rule == "adamw" else 1.0,
        ),
        "embedding": Multipliers(eps=outside),
        "head": Multipliers(eps=outside),
        "norm": Multipliers(eps=inside),
        "bias": Multipliers(eps=inside),
    }


def forward_multipliers(
    kind: str, *, width: float, depth: float = 1.0, head_width: float = 1.0
) -> ForwardMultipliers:
    """The factors that the model itself applies.

    Args:
      kind: as in multipliers.
      width: as in multipliers.
      depth: as in multipliers.
      head_width: width H of a head, as a multiple of the base model's: logits of attention are divided by H, and not by
        its square root, with a constant that leaves the base model as it is. 1 where wider models have more heads.

    Raises:
      SmoljaxError: an unknown kind, or a size that is not a positive number.
    """
    _check(kind, width=width, depth=depth, head_width=head_width)
    if kind == "standard":
        return ForwardMultipliers()
    return ForwardMultipliers(
        residual=1 / depth if kind == "completep" else 1.0,
        readout=1 / width,
        attention=head_width**-0.5,
    )


def _check(kind: str, **sizes: float) -> None:
    if kind not in KINDS:
        raise SmoljaxError(f"parametrization is {kind!r}: choose one of {', '.join(KINDS)}")
    for name, size in sizes.items():
        if not (isinstance(size, numbers.Real) and math.isfinite(size) and size > 0):
            raise SmoljaxError(
                f"{name} is {size!r}: give the model's size divided by the base model's, a positive number"
            )
