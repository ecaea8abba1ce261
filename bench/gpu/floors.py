"""The least time that a graph can take on an H200: its bytes over the memory's rate, or its operations over the peak.

A floor is the larger of the two. NVIDIA's figures for one H200 SXM: 4.8 TB/s; dense products in bf16 and fp16
989 Tflop/s, in fp32 without TF32 67 Tflop/s. Operations are counted as two per weight and token, and four per head
dimension and pair of query and key. Norms, rotations, embeddings and heads are left out, so a floor is never too high.
"""

from __future__ import annotations

from dataclasses import dataclass

from unipinrec.models.config import ModelConfig

BYTES_PER_S = 4.8e12
FLOPS = {"fp32": 67e12, "bf16": 989e12, "fp16": 989e12}
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True)
class Load:
    """One run.

    Attributes:
        events: Events of each history.
        candidates: Candidates of each history.
        batch: Histories.
    """

    events: int
    candidates: int
    batch: int = 1


def floors_ms(config: ModelConfig, precision: str, load: Load) -> dict[str, float]:
    """Floors of encoding and of ranking, in milliseconds."""
    weights = layer_weights(config)
    layers, slots = config.num_layers, load.events + 1
    kv_dim = config.hidden_size // config.num_heads * config.num_kv_heads
    kv_values = 2 * layers * slots * kv_dim
    # The last layer of the encoder makes keys and values of all events, and the rest for the last event alone.
    last = 2 * config.hidden_size * kv_dim
    causal = load.events * slots // 2
    encode = 2 * load.events * ((layers - 1) * weights + last) + 4 * config.hidden_size * (layers - 1) * causal
    rank = load.candidates * layers * (2 * weights + 4 * config.hidden_size * slots)
    moved = {"encode": layers * weights + load.batch * kv_values, "rank": layers * weights + load.batch * kv_values}
    flops = {"encode": load.batch * encode, "rank": load.batch * rank}
    return {
        name: round(1e3 * max(moved[name] * WIDTH[precision] / BYTES_PER_S, flops[name] / FLOPS[precision]), 4)
        for name in moved
    }


def layer_weights(config: ModelConfig) -> int:
    """Weights of the products of one layer: query, key, value, output, and the three of the feed-forward."""
    width, kv_dim = config.hidden_size, config.hidden_size // config.num_heads * config.num_kv_heads
    return 2 * width * width + 2 * width * kv_dim + 3 * width * config.intermediate_size


def kv_bytes(config: ModelConfig, precision: str, events: int) -> int:
    """Bytes of the keys and values of one history."""
    kv_dim = config.hidden_size // config.num_heads * config.num_kv_heads
    return 2 * config.num_layers * (events + 1) * kv_dim * WIDTH[precision]
