"""The content of the items as arrays, the input of an item embedder. Needs no data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ItemFeatures:
    """Raw item features by catalogue row: dense [N, F] f32, categories [N, features] i64 (0 = unknown)."""

    dense: NDArray[np.float32]
    categories: NDArray[np.int64]
