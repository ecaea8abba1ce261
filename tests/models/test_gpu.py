"""Training and the model's invariants on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from synthetic import random_model

from unipinrec.models.config import TINY
from unipinrec.models.model import CandidateTokens, HistoryTokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_bf16_training_reaches_what_fp32_reaches(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pytest.importorskip("polars", reason="polars is not installed, which data sets need")
    from unipinrec.models.data.schema import read_dataset
    from unipinrec.models.evaluate import held_out_requests
    from unipinrec.models.training.config import RunConfig, TrainConfig
    from unipinrec.models.training.train import EpochReport, Trainer

    dataset: Path = request.getfixturevalue("dataset")
    scores = {}
    for precision in ("fp32", "bf16"):
        train = TrainConfig(epochs=4, batch_size=32, precision=precision, seed=3)
        trainer = Trainer(read_dataset(dataset), RunConfig(model=TINY, train=train), tmp_path / precision)
        assert len(held_out_requests(trainer.data, trainer.positive, "valid")) > 100
        reports = [report for report in trainer.run() if isinstance(report, EpochReport)]
        scores[precision] = reports[-1].metrics.selection_score()
        assert next(trainer.model.parameters()).device.type == "cuda"
    assert scores["bf16"] == pytest.approx(scores["fp32"], abs=0.05)


def test_split_equals_whole_on_the_device() -> None:
    model = random_model("sink", 300, TINY).cuda().eval()
    generator = torch.Generator().manual_seed(0)
    batch, events, count = 3, 40, 30
    vectors = torch.nn.functional.normalize(torch.randn(batch, events + count, 64, generator=generator), dim=-1).cuda()
    lengths = torch.tensor([40, 7, 1]).cuda()
    times = 1_700_000_000_000 + torch.randint(0, 10**7, (batch, events), generator=generator).cumsum(1).cuda()
    history = HistoryTokens(
        vectors=vectors[:, :events],
        actions=(torch.rand(batch, events, 4, generator=generator) < 0.3).float().cuda(),
        surfaces=torch.zeros(batch, events, dtype=torch.int64).cuda(),
        timestamps_ms=times,
        lengths=lengths,
    )
    slate = CandidateTokens(
        vectors=vectors[:, events:],
        surfaces=torch.zeros(batch, count, dtype=torch.int64).cuda(),
        timestamps_ms=torch.full((batch, count), 1_800_000_000_000).cuda(),
        cutoffs=lengths[:, None].expand(-1, count),
    )
    with torch.inference_mode():
        key_values, _ = model.encode(history)
        last = times.gather(1, (lengths - 1)[:, None])[:, 0]
        logits = model.rank(key_values, lengths, last, slate)
        masked = torch.zeros(batch, events).cuda()
        _, whole = model.joint(history, masked, slate, dense_mask=True)
    torch.testing.assert_close(logits, model.action_heads(whole), atol=1e-4, rtol=0)
