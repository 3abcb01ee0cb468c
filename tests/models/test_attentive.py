import pytest
import torch
from torch import Tensor, nn

from hpm_video.models.classifier import AttentivePooling


@pytest.fixture
def pooling() -> AttentivePooling:
    """Random values everywhere, so that initial zeros hide no part."""
    torch.manual_seed(0)
    module = AttentivePooling(24, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def tokens_of(batch: int, tokens: int) -> Tensor:
    return torch.randn(batch, tokens, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 10), (0, 4)])
def test_one_vector_for_each_clip(pooling, batch, tokens):
    assert pooling(tokens_of(batch, tokens)).shape == (batch, 24)


def test_the_order_of_tokens_does_not_matter(pooling):
    tokens = tokens_of(2, 11)
    torch.testing.assert_close(pooling(tokens.flip(1)), pooling(tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        pooling(torch.cat([tokens, tokens], dim=1)), pooling(tokens), atol=1e-5, rtol=1e-5
    )


def test_clips_do_not_see_each_other(pooling):
    tokens = tokens_of(3, 5)
    alone = torch.cat([pooling(clip) for clip in tokens.split(1)])
    torch.testing.assert_close(pooling(tokens), alone, atol=1e-5, rtol=1e-5)


def test_attention_equals_that_of_pytorch(pooling):
    tokens = tokens_of(2, 9)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        weights = [layer.weight for layer in (pooling.q, pooling.k, pooling.v)]
        theirs.in_proj_weight.copy_(torch.cat(weights))
        theirs.in_proj_bias.zero_()
        theirs.in_proj_bias[:24] = pooling.q.bias
        theirs.out_proj.load_state_dict(pooling.proj.state_dict())
    query = pooling.latent.expand(2, -1, -1)
    expected, weights = theirs(query, tokens, tokens)
    torch.testing.assert_close(pooling.attend(tokens), expected.squeeze(1), atol=1e-5, rtol=1e-5)
    assert weights.std() > 0.01  # the query does distinguish tokens


def test_the_whole_is_attention_over_normed_tokens_and_a_residual_mlp(pooling):
    tokens = tokens_of(2, 9)
    normed = nn.functional.layer_norm(
        tokens, (24,), pooling.norm1.weight, pooling.norm1.bias, eps=1e-6
    )
    pooled = pooling.attend(normed)
    hidden = nn.functional.layer_norm(
        pooled, (24,), pooling.norm2.weight, pooling.norm2.bias, eps=1e-6
    )
    first, second = pooling.mlp.fc1, pooling.mlp.fc2
    hidden = nn.functional.gelu(hidden @ first.weight.T + first.bias)
    expected = pooled + hidden @ second.weight.T + second.bias
    torch.testing.assert_close(pooling(tokens), expected)


def test_gradients_reach_every_parameter_from_the_start():
    torch.manual_seed(0)
    pooling = AttentivePooling(24, 3)
    pooling(tokens_of(4, 9)).square().sum().backward()
    for name, parameter in pooling.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name


def test_initial_values():
    torch.manual_seed(0)
    pooling = AttentivePooling(512, 8)
    assert pooling.latent.std().item() == pytest.approx(0.02, rel=0.2)
    assert pooling.k.weight.abs().max().item() == pytest.approx((6 / 1024) ** 0.5, rel=1e-3)
    for name, parameter in pooling.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
