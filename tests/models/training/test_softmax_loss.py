import pytest
import torch
import torch.nn.functional as F

from unipinrec.models.training import softmax_loss as module
from unipinrec.models.training.softmax_loss import softmax_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_equals_the_cross_entropy_of_the_whole_logits(
    monkeypatch: pytest.MonkeyPatch, smoothing: float, chunk: int
) -> None:
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", chunk)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(200, 5, generator=generator, requires_grad=True)
    items = torch.randn(31, 5, generator=generator, requires_grad=True)
    log_q, labels = torch.randn(31, generator=generator), torch.randint(31, (200,), generator=generator)
    found = softmax_loss(queries, items, log_q, labels, smoothing)
    wanted = F.cross_entropy(queries @ items.T - log_q, labels, label_smoothing=smoothing)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(3.0 * found, (queries, items))
    expected = torch.autograd.grad(3.0 * wanted, (queries, items))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_a_far_fetched_label_has_a_finite_loss() -> None:
    queries, items = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss = softmax_loss(queries, items, torch.zeros(2), torch.tensor([1]))
    assert loss.item() == 400.0
    loss.backward()
    assert queries.grad is not None
    assert queries.grad.item() == 2.0


def test_no_targets_cost_nothing_and_keep_every_gradient() -> None:
    queries, items = torch.zeros(0, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    loss = softmax_loss(queries, items, torch.zeros(4), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert items.grad is not None
    assert items.grad.tolist() == [[0.0] * 3] * 4
