"""What all models of the next item have in common as something to export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from unipinrec.export.protocol import ExportSource
from unipinrec.runtime.bundle.manifest import ModelSpec


def next_item_source(
    module: nn.Module, model: ModelSpec, item_ids: Sequence[str], config: dict[str, Any]
) -> ExportSource:
    """Make an export source of a model that reads nothing of an event but its item. Puts the module in eval mode."""
    count = len(item_ids)
    return ExportSource(
        module=module.eval(),
        model=model,
        actions=("click",),
        positive_actions=("click",),
        surfaces=("unknown",),
        dense={},
        categories={},
        item_ids=list(item_ids),
        titles=[None] * count,
        item_dense=np.zeros((count, 0), np.float32),
        item_categories=np.zeros((count, 0), np.int64),
        config=config,
    )
