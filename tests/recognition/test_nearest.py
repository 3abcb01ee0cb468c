import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpm_video.recognition.nearest import knn_probabilities


def samples(count: int, dim: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, dim, generator=generator)
    return features, torch.randint(classes, (count,), generator=generator)


def naive(
    features: Tensor, bank: Tensor, labels: Tensor, k: int, classes: int, temperature: float
) -> Tensor:
    """One query at a time in plain Python, from the definition."""
    rows = []
    for query in features.double():
        similarities = [
            float(query @ other / (query.norm() * other.norm())) for other in bank.double()
        ]
        votes = [0.0] * classes
        for index in sorted(range(len(bank)), key=lambda i: -similarities[i])[:k]:
            votes[int(labels[index])] += math.exp(similarities[index] / temperature)
        rows.append([vote / sum(votes) for vote in votes])
    return torch.tensor(rows)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_equals_the_definition(chunk, temperature):
    bank, labels = samples(40, 6, 5)
    queries, _ = samples(9, 6, 5, seed=1)
    found = knn_probabilities(
        queries, bank, labels, k=(10, 1, 40), num_classes=5, temperature=temperature, chunk=chunk
    )
    assert list(found) == [10, 1, 40]
    for k, shares in found.items():
        expected = naive(queries, bank, labels, k, 5, temperature)
        torch.testing.assert_close(shares, expected, atol=1e-5, rtol=1e-4)


def test_known_value():
    bank = torch.tensor([[2.0, 0], [0, 3], [-1, 0]])
    shares = knn_probabilities(
        torch.tensor([[5.0, 0]]), bank, torch.tensor([1, 0, 0]), k=[2], num_classes=3
    )[2]
    other = math.exp(-1 / 0.07)
    torch.testing.assert_close(shares, torch.tensor([[other, 1, 0]]) / (1 + other))


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), temperature=st.sampled_from([1e-6, 0.07, 10.0]))
def test_shares_sum_to_one_and_the_order_of_the_bank_does_not_matter(seed, temperature):
    bank, labels = samples(30, 4, 3, seed)
    queries, _ = samples(7, 4, 3, seed + 1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    options = {"k": (1, 5, 30), "num_classes": 3, "temperature": temperature, "chunk": 3}
    found = knn_probabilities(queries, bank, labels, **options)
    permuted = knn_probabilities(queries, bank[order], labels[order], **options)
    for k, shares in found.items():
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(7))
        if temperature > 1e-3:  # below it, rounding of the similarities tells
            torch.testing.assert_close(permuted[k], shares, atol=1e-5, rtol=1e-4)


def test_a_duplicate_of_a_labelled_sample_gets_its_label():
    bank, labels = samples(50, 8, 6)
    found = knn_probabilities(bank, bank, labels, k=(50,), num_classes=6, temperature=1e-3)[50]
    assert found.argmax(dim=1).equal(labels)
    assert found.amax(dim=1).min() > 0.999


def test_lengths_of_features_do_not_matter():
    bank, labels = samples(20, 5, 4)
    queries, _ = samples(6, 5, 4, seed=1)
    lengths = torch.linspace(0.1, 90, 20).unsqueeze(1)
    options = {"k": (3,), "num_classes": 4}
    found = knn_probabilities(queries, bank, labels, **options)[3]
    scaled = knn_probabilities(7 * queries, lengths * bank, labels, **options)[3]
    torch.testing.assert_close(scaled, found, atol=1e-5, rtol=1e-4)


def test_a_feature_of_zeros_is_equally_far_from_all():
    bank, _ = samples(4, 3, 2)
    labels = torch.tensor([0, 0, 0, 1])
    found = knn_probabilities(torch.zeros(1, 3), bank, labels, k=(4,), num_classes=2)[4]
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.25]]))


def test_half_precision_and_no_queries_are_fine():
    bank, labels = samples(20, 5, 4)
    found = knn_probabilities(bank.bfloat16(), bank.bfloat16(), labels, k=(1,), num_classes=4)[1]
    assert found.dtype == torch.float32
    assert found.argmax(dim=1).equal(labels)
    assert knn_probabilities(bank[:0], bank, labels, k=(1,), num_classes=4)[1].shape == (0, 4)


def test_similarities_are_held_for_some_queries_only():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor):
                    Largest.elements = max(Largest.elements, tensor.numel())
            return result

    bank, labels = samples(400, 4, 3)
    with Largest():
        knn_probabilities(bank, bank, labels, k=(10,), num_classes=3, chunk=8)
    assert 0 < Largest.elements <= 8 * 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 21)}, r"1\.\.20, the size of the bank, got \[1, 21\]; lower k"),
        ({"k": (0,)}, r"got \[0\]"),
        ({"k": ()}, r"got \[\]"),
        ({"num_classes": 3}, r"0\.\.2, got 0\.\.3; .*raise num_classes"),
        ({"temperature": 0.0}, "above 0, got 0.0; 0.07 is usual"),
        ({"chunk": 0}, "at least 1 query, got 0"),
        ({"features": torch.zeros(2, 4)}, r"got \(2, 4\), \(20, 5\) and \(20,\); take"),
        ({"bank_labels": torch.zeros(19)}, r"and \(19,\); take"),
        ({"features": torch.full((2, 5), math.nan)}, "features must be finite, got 2 of 2 rows"),
        ({"bank": torch.full((20, 5), math.inf)}, "bank must be finite, got 20 of 20 rows"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    bank, _ = samples(20, 5, 4)
    labels = torch.arange(20) % 4
    given_ = {"features": bank, "bank": bank, "bank_labels": labels, "k": (3,), "num_classes": 4}
    with pytest.raises(ValueError, match=message):
        knn_probabilities(**(given_ | change))
