"""What a call of attention asks of a backend."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Request:
    """Each backend has a function `refusal(request)`: why it cannot do this, or None when it can.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      dtype: of the queries, as "bfloat16".
      head_dim: H.
      seq_len: S.
      causal: a query sees keys up to its own position only.
      documents: there are segment ids.
      capped: there is a logit_cap.
      max_logits: the maxima are wanted.
    """

    platform: str
    dtype: str
    head_dim: int
    seq_len: int
    causal: bool = True
    documents: bool = False
    capped: bool = False
    max_logits: bool = False
