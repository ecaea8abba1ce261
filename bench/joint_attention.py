"""Attention of one training step over [history ; candidates]: two SDPA calls, one dense mask, or FlexAttention.

    python bench/joint_attention.py [--rounds 15] [--threads 2] [--device cpu]

Forward and backward of one layer's attention in the "sink" form, interleaved; median, 10th, 90th percentile.
    split   causal SDPA for the history, masked SDPA for the candidates: n^2 + nk
    dense   one SDPA with an (n + k) x (1 + n + k) mask
    flex    one compiled FlexAttention with the same rule as a block mask
What cannot run is reported with its reason.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import card, finish
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from unipinrec.models.attention import attend, attend_history, joint_mask

SHAPES = (
    {"batch": 64, "heads": 2, "head_dim": 32, "n": 64, "k": 64},
    {"batch": 8, "heads": 8, "head_dim": 32, "n": 512, "k": 256},
    {"batch": 2, "heads": 8, "head_dim": 32, "n": 992, "k": 656},
)


def split(query: Tensor, key: Tensor, value: Tensor, cutoffs: Tensor, events: int) -> Tensor:
    past = key[:, :, : events + 1], value[:, :, : events + 1]
    visible = torch.arange(events + 1, device=key.device) < (cutoffs + 1)[:, :, None]
    history = attend_history("sink", query[:, :, :events], *past)
    return torch.cat([history, attend(query[:, :, events:], *past, visible[:, None])], dim=2)


def dense(query: Tensor, key: Tensor, value: Tensor, cutoffs: Tensor, events: int) -> Tensor:
    return attend(query, key, value, joint_mask("sink", events, cutoffs)[:, None])


COMPILED: Callable[..., Any] = torch.compile(flex_attention)


def flex(query: Tensor, key: Tensor, value: Tensor, cutoffs: Tensor, events: int) -> Tensor:
    limits = torch.cat([torch.arange(events, device=key.device).expand(len(cutoffs), -1), cutoffs], dim=1)

    def visible(batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        return slot <= limits[batch, row]

    mask = create_block_mask(visible, len(cutoffs), None, query.shape[2], key.shape[2], device=str(key.device))
    attended: Tensor = COMPILED(query, key, value, block_mask=mask)
    return attended


WAYS = {"split": split, "dense": dense, "flex": flex}


def inputs(shape: dict[str, int], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = shape["n"] + shape["k"]

    def heads(length: int) -> Tensor:
        size = (shape["batch"], shape["heads"], length, shape["head_dim"])
        return torch.randn(size, generator=generator).to(device).requires_grad_()

    cutoffs = torch.randint(1, shape["n"] + 1, (shape["batch"], shape["k"]), generator=generator).to(device)
    return heads(tokens), heads(tokens + 1), heads(tokens + 1), cutoffs


def step_ms(way: str, given: tuple[Tensor, Tensor, Tensor, Tensor], events: int) -> float:
    began = time.perf_counter()
    WAYS[way](*given, events).square().mean().backward()
    if given[0].is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def measure(shape: dict[str, int], rounds: int, device: str) -> dict[str, Any]:
    given, usable, row = inputs(shape, device), [], dict[str, Any](shape)
    expected = split(*given, shape["n"])
    for way, attention in WAYS.items():
        try:
            difference = (attention(*given, shape["n"]) - expected).abs().max()
            step_ms(way, given, shape["n"])
        except Exception as error:  # a way that this device or build cannot run is a result
            row[way] = {"cannot run": str(error).splitlines()[0]}
            continue
        row[way] = {"max_abs_diff": float(difference)}
        usable.append(way)
    times: dict[str, list[float]] = {way: [] for way in usable}
    for _ in range(rounds):
        for way in usable:
            times[way].append(step_ms(way, given, shape["n"]))
    for way in usable:
        low, middle, high = np.percentile(times[way], [10, 50, 90])
        ratio = np.median(np.array(times[way]) / np.array(times["split"]))
        row[way] |= {"ms": [round(float(v), 2) for v in (middle, low, high)], "over_split": round(float(ratio), 3)}
    return row


def main() -> None:
    """Measure all shapes and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(shape, options.rounds, options.device) for shape in SHAPES]
    name = "joint_attention" if options.device == "cpu" else f"gpu/joint_attention_{options.device}"
    finish({**card("joint_attention"), "device": options.device, "threads": options.threads, "rows": rows}, name)


if __name__ == "__main__":
    main()
