"""`flashlla.nn.LocalLinearAttention`."""

import dense
import pytest
import torch
from conftest import assert_near, random
from flashlla.nn import LocalLinearAttention
from torch import nn


def block(**options) -> LocalLinearAttention:
    torch.manual_seed(0)
    return LocalLinearAttention(24, 4, dtype=torch.float64, **options)


def x(*shape: int) -> torch.Tensor:
    return random(*(shape or (2, 9, 24)), seed=1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"causal": True, "window": 3}])
def test_is_projections_around_the_operator(kv_heads: int, mask: dict) -> None:
    module = block(num_kv_heads=kv_heads, ridge=0.5, **mask)
    with torch.no_grad():
        module.log_ridge += random(4, seed=2)
        module.log_scale += random(kv_heads, seed=3)
    q, k, v = (
        projection(x()).unflatten(2, (-1, 6)).swapaxes(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    scale = (module.log_scale.exp() * 6**-0.5).repeat_interleave(4 // kv_heads)
    out = dense.attention(q, k, v, ridge=module.log_ridge.exp(), scale=scale, **mask)
    want = module.out_proj(out.swapaxes(1, 2).flatten(2))
    got = module(x())
    assert_near(got, want, 1e-10)
    parameters = list(module.parameters())
    mine, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (got, want))
    for (name, _), a, b in zip(module.named_parameters(), mine, theirs, strict=True):
        assert_near(a, b, 1e-8, name)


def test_called_like_multihead_attention() -> None:
    module = block()
    out, weights = module(x(), x(), x(), need_weights=False)
    assert weights is None and torch.equal(out, module(x()))
    other = LocalLinearAttention(24, 4, kdim=10, vdim=12)
    out, _ = other(x().float(), torch.randn(2, 7, 10), torch.randn(2, 7, 12))
    assert out.shape == (2, 9, 24)
    second = block(batch_first=False)
    assert torch.equal(second(x().transpose(0, 1)).transpose(0, 1), module(x()))
    assert torch.equal(module(x()[0]), module(x()[:1])[0])


def test_stands_in_a_transformer_encoder_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn = block()
    mask = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    for mode in (True, False):
        layer.train(mode)
        out = layer(x(), src_mask=mask, is_causal=True)
        moved = x()
        moved[:, 5:] += 1
        later = layer(moved, src_mask=mask, is_causal=True)
        assert_near(later[:, :5], out[:, :5], 1e-12)
        assert (later[:, 5:] - out[:, 5:]).abs().max() > 1e-3
    out.sum().backward()
    assert layer.self_attn.log_ridge.grad.abs().sum() > 0


def test_padding_is_as_if_it_were_not_there() -> None:
    module = block()
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 6:] = True
    out = module(x(), key_padding_mask=padding)
    assert_near(out[:1, :6], module(x()[:1, :6]), 1e-11)
    assert_near(out[1:], module(x()[1:]), 1e-12)
    numbers = torch.zeros(2, 9).masked_fill(padding, -torch.inf)
    assert torch.equal(module(x(), key_padding_mask=numbers), out)


def test_rotation_depends_on_distance_only() -> None:
    module = block(rope=True, causal=True, window=4)
    with torch.no_grad():
        far = module(torch.cat((random(2, 5, 24, seed=7), x()), 1))[:, 5:]
        near = module(x())
    assert_near(far[:, 3:], near[:, 3:], 1e-6)  # The window of the first three reaches beyond the start.
    # The last queries alone, as after a prefix.
    out, _ = module(x()[:, 6:], x(), x())
    assert_near(out, near[:, 6:], 1e-10)
    still = block(rope=False, causal=True)
    assert (still(x()) - block(rope=True, causal=True)(x())).abs().max() > 1e-3


def test_normalised_queries_and_keys() -> None:
    module = block(qk_norm=True)
    grown = block(qk_norm=True)
    with torch.no_grad():
        for projection in (grown.q_proj, grown.k_proj):
            projection.weight *= 7
            projection.bias *= 7
    assert_near(grown(x()), module(x()), 1e-6)


def test_state_and_dtypes() -> None:
    module = block(learn_ridge=False, learn_scale=False)
    assert not any("log" in name for name in module.state_dict())
    half = LocalLinearAttention(24, 4, dtype=torch.bfloat16)
    assert half.log_ridge.dtype == torch.float32
    out = half(x().bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert half.log_scale.grad.isfinite().all()
    other = LocalLinearAttention(24, 4, dtype=torch.bfloat16)
    other.load_state_dict(half.state_dict())
    assert torch.equal(other(x().bfloat16()), out)
    assert "num_heads=4" in repr(half)


def test_compiles() -> None:
    module = LocalLinearAttention(24, 4, num_kv_heads=2, rope=True, qk_norm=True, causal=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x().float()), module(x().float()), 1e-5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 5}, "embed_dim"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"head_dim": 257}, "head_dim"),
        ({"head_dim": 5, "rope": True}, "head_dim"),
        ({"ridge": 0.0}, "ridge"),
    ],
)
def test_wrong_options(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        LocalLinearAttention(**({"embed_dim": 24, "num_heads": 4} | options))


def test_wrong_calls() -> None:
    module = block()
    with pytest.raises(ValueError, match="^need_weights:"):
        module(x(), x(), x(), need_weights=True)
    with pytest.raises(ValueError, match="^attn_mask:"):
        module(x(), attn_mask=torch.zeros(9, 9))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("query", {"query": torch.ones(2, 9, 23)}),
        ("query", {"query": torch.ones(24)}),
        ("key", {"key": torch.ones(2, 7, 23)}),
        ("key", {"key": torch.ones(7, 24)}),
        ("value", {"key": torch.ones(2, 7, 24), "value": torch.ones(2, 7, 25)}),
        ("key_padding_mask", {"key_padding_mask": torch.zeros(2, 8, dtype=torch.bool)}),
        ("key_padding_mask", {"key_padding_mask": torch.zeros(9, 2, dtype=torch.bool)}),
    ],
)
def test_errors_of_a_call_name_the_argument(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"^{name}: shape"):
        block()(**({"query": x()} | arguments))


def test_a_padding_mask_of_integers_is_refused() -> None:
    with pytest.raises(TypeError, match="^key_padding_mask: dtype torch.int64"):
        block()(x(), key_padding_mask=torch.zeros(2, 9, dtype=torch.int64))
