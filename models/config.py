"""The architecture of a model, its vocabulary, and the named sizes."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ConfigError

AttentionForm = Literal["sink", "self"]
ItemForm = Literal["mlp", "residual"]
DAY_MS = 86_400_000
MISSING_TIMESTAMP_MS = -1  # an unknown time in tensors; not 0, which is 1970


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Architecture of the transformer and its heads (paper section 3; norms, RoPE, SwiGLU and GQA are ours).

    Attributes:
        num_layers: L.
        hidden_size: d, the width of a token.
        num_heads: Query heads; the head dimension is hidden_size / num_heads.
        num_kv_heads: Key/value heads (GQA when fewer than num_heads).
        intermediate_size: Width of the SwiGLU feed-forward.
        max_history: n_max, the longest history in events.
        item_dim: E, the width of an item vector and of a query.
        id_dim: Width of an item's id embedding before the embedder's MLP.
        feature_dim: Width of each action, surface, time and item-category embedding.
        attention: "sink": an event sees a learned sink key and strictly earlier events; "self": it sees earlier
            events and itself (the paper's form). docs/decisions/0001 holds the measurement.
        outcome_conditioned: Whether a query is conditioned on the actions to aim at.
        mark_masked: Whether training marks events of the history whose actions are hidden, to tell them from
            candidates: an event is in the log because of an action, a shown item need not be. Serving has no masked
            events and no mark (docs/decisions/0013). False is the paper's form; training uses it if the data has no
            slates.
        item_form: "mlp": an item's vector is an MLP of its id embedding and content; "residual": the id embedding plus
            that MLP, so that ids are learned directly (id_dim must equal item_dim).
        dropout: Dropout probability on each residual branch in training.
        token_dropout: Dropout probability on the tokens that enter the first block, in training.
        id_dropout: Probability in training that the id of an item with content is hidden. It trains the vector of new
            items and reduces overfitting to ids.
        category_dropout: Probability in training that a category of an item is hidden.
        rope_theta: Base of the rotary position encoding, over the event index.
        norm_eps: Epsilon of every RMSNorm.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    max_history: int
    item_dim: int
    id_dim: int
    feature_dim: int
    attention: AttentionForm = "sink"
    outcome_conditioned: bool = False
    mark_masked: bool = False
    item_form: ItemForm = "mlp"
    dropout: float = 0.0
    token_dropout: float = 0.0
    id_dropout: float = 0.1
    category_dropout: float = 0.0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in (
            *("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size"),
            *("max_history", "item_dim", "id_dim", "feature_dim"),
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                f"hidden_size={self.hidden_size} must be a multiple of 2 * num_heads={2 * self.num_heads} "
                "(rotary encoding needs an even head dimension)"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.item_form == "residual" and self.id_dim != self.item_dim:
            raise ConfigError(
                f'item_form="residual" adds the id embedding to the item vector: id_dim={self.id_dim} must equal '
                f"item_dim={self.item_dim}"
            )
        for name in ("dropout", "token_dropout", "id_dropout", "category_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("rope_theta", "norm_eps"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive and finite")

    @property
    def head_dim(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_prefix_slots(self) -> int:
        """Slots of the key/value tensors that come before the first event: 1 with a sink, else 0."""
        return 1 if self.attention == "sink" else 0


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The names and sizes from the data that determine the shapes of the model's weights.

    Attributes:
        num_items: Rows of the catalogue.
        actions: Action names, in the order of every action vector (C names).
        positive_actions: The actions that make an event a retrieval target.
        surfaces: Surface names; index 0 stands for unknown.
        dense: Width of each dense item feature.
        categories: Words of each categorical item feature; code = index + 1, code 0 = unknown.
    """

    num_items: int
    actions: tuple[str, ...]
    positive_actions: tuple[str, ...]
    surfaces: tuple[str, ...]
    dense: dict[str, int]
    categories: dict[str, tuple[str, ...]]

    @property
    def positive(self) -> NDArray[np.bool_]:
        """Which of the actions are positive, [C]."""
        return np.array([name in self.positive_actions for name in self.actions])

    @property
    def dense_width(self) -> int:
        """F, the summed width of the dense item features."""
        return sum(self.dense.values())


TINY = ModelConfig(
    num_layers=2,
    hidden_size=64,
    num_heads=2,
    num_kv_heads=2,
    intermediate_size=192,
    max_history=64,
    item_dim=64,
    id_dim=64,
    feature_dim=16,
    mark_masked=True,
)
SMALL = msgspec.structs.replace(
    TINY,
    num_layers=4,
    hidden_size=256,
    num_heads=8,
    num_kv_heads=8,
    intermediate_size=704,
    max_history=992,
    feature_dim=32,
)
PAPER = msgspec.structs.replace(
    TINY,
    num_layers=12,
    hidden_size=768,
    num_heads=12,
    num_kv_heads=12,
    intermediate_size=2048,
    max_history=1024,
    item_dim=256,
    id_dim=256,
    feature_dim=64,
)
SIZES = {"tiny": TINY, "small": SMALL, "paper": PAPER}
