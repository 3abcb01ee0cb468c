import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hpm_video.mining import losses
from hpm_video.mining.losses import count_ordered_pairs, ranking_loss, regression_loss


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(losses, "ROWS", 16)


def dense_ranking_loss(scores: Tensor, errors: Tensor) -> Tensor:
    """The definition: over the whole (B, M, M) matrix, in float64."""
    order = (errors.unsqueeze(2) - errors.unsqueeze(1)).sign().double()
    margin = scores.double().unsqueeze(2) - scores.double().unsqueeze(1)
    counted = order.abs()
    return (F.softplus(-order * margin) * counted).sum() / counted.sum().clamp(min=1)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 2), (3, 15), (2, 16), (2, 40)])
@pytest.mark.parametrize("levels", [1, 2, 9])  # few levels: many ties
def test_blockwise_equals_the_definition(batch, tokens, levels):
    generator = torch.Generator().manual_seed(tokens)
    scores = (8 * torch.randn(batch, tokens, generator=generator)).requires_grad_()
    errors = torch.randint(levels, (batch, tokens), generator=generator).float()
    ours, expected = ranking_loss(scores, errors), dense_ranking_loss(scores, errors)

    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_known_value():
    scores = torch.tensor([[0.5, -1, 2, 0], [1, 1, -2, 0.25]])
    errors = torch.tensor([[1.0, 3, 2, 2], [0.1, 0.4, 0.3, 0.2]])
    assert ranking_loss(scores, errors).item() == pytest.approx(1.354820, abs=1e-6)
    assert count_ordered_pairs(scores, errors)[1] == 11


def test_nothing_to_order_is_zero():
    scores = torch.randn(2, 5, requires_grad=True)
    loss = ranking_loss(scores, torch.ones(2, 5))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad is not None
    assert not scores.grad.any()


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(scores=st.lists(finite, min_size=20, max_size=20), dtype=st.sampled_from(["half", "float"]))
def test_finite_for_any_finite_scores(scores, dtype):
    values = torch.tensor(scores).to(getattr(torch, "float16" if dtype == "half" else "float32"))
    values = values.nan_to_num().requires_grad_()
    loss = ranking_loss(values.view(1, -1), torch.arange(20.0).view(1, -1))
    loss.backward()
    assert loss.isfinite()
    assert values.grad.isfinite().all()


@given(shift=st.floats(-100, 100))
def test_adding_a_constant_to_all_scores_changes_nothing(shift):
    scores, errors = torch.linspace(-2, 2, 12).view(1, -1), torch.arange(12.0).view(1, -1) % 5
    shifted = ranking_loss(scores + shift, errors)
    torch.testing.assert_close(shifted, ranking_loss(scores, errors), rtol=1e-4, atol=1e-5)


def test_errors_get_no_gradient():
    errors = torch.rand(2, 6, requires_grad=True)
    for loss in (ranking_loss, regression_loss):
        result = loss(torch.rand(2, 6, requires_grad=True), errors)
        assert torch.autograd.grad(result, errors, allow_unused=True) == (None,)


def test_regression_is_against_errors_standardised_in_each_clip():
    errors = torch.tensor([[1.0, 2, 3], [10, 20, 30]])
    scores = torch.tensor([[-1.0, 0, 1], [-1, 0, 2]])
    assert regression_loss(scores, errors).item() == pytest.approx(1 / 6, abs=1e-5)


def test_pairs_in_order_are_counted():
    errors = torch.tensor([[3.0, 2, 2, 1]])
    assert count_ordered_pairs(errors, errors) == (5, 5)
    assert count_ordered_pairs(-errors, errors) == (0, 5)
    assert count_ordered_pairs(torch.zeros(1, 4), errors) == (2.5, 5)


def test_no_tensor_of_all_pairs_is_held():
    """This looks at the largest tensor that any operation returns, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor):
                    Largest.elements = max(Largest.elements, tensor.numel())
            return result

    scores = torch.randn(4, 320, requires_grad=True)
    with Largest():
        ranking_loss(scores, torch.rand(4, 320)).backward()
    assert 0 < Largest.elements <= 4 * 16 * 320
