"""scalar_attention is exact, forward and backward, for any finite scores."""

import pytest
import torch
from conftest import SCRIPTS
from reference import HeadByHead, attention_weights, naive_attention, with_attention

import mini_vit

SCALE = 784**-0.5  # of mini_vit.py
DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append("cuda")


def random_inputs(d_head: int, largest_score: float, device="cpu") -> tuple[torch.Tensor, ...]:
    """Return q, k, v and a gradient do, (50, 3, d_head) each, with scores up to the largest."""
    generator = torch.Generator().manual_seed(d_head)
    q, k, v, do = torch.randn(4, 50, 3, d_head, generator=generator).to(device)
    top = (q.abs().amax(-1) * k.abs().amax(-1)).amax()
    q = q * (largest_score / SCALE / top)
    return q, k, v, do


def gradient_magnitudes(q, k, v, do, scale):
    """Return dq, dk, dv summed over absolute values: what rounding errors are relative to."""
    p = attention_weights(q, k, scale)
    o = (p @ v.unsqueeze(-1)).squeeze(-1)
    # |dS_ij|, where S are the scores
    ds = do.abs().unsqueeze(-1) * p * (v.unsqueeze(-2).abs() + o.unsqueeze(-1).abs())
    dq = (ds * k.unsqueeze(-2).abs()).sum(-1) * scale
    dk = (ds * q.unsqueeze(-1).abs()).sum(-2) * scale
    dv = (p * do.abs().unsqueeze(-1)).sum(-2)
    return dq, dk, dv


@pytest.mark.parametrize("definition", [naive_attention, mini_vit.attention_by_the_book])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("largest_score", [0.0, 1e-3, 1.0, 15.0, 100.0, 1000.0])
@pytest.mark.parametrize("d_head", [1, 2, 7, 56, 98])
def test_output_and_gradients_match_float64(d_head, largest_score, device, definition):
    *qkv, do = random_inputs(d_head, largest_score, device)
    inputs = [x.clone().requires_grad_() for x in qkv]
    exact = [x.double().requires_grad_() for x in qkv]
    attention = mini_vit.scalar_attention
    if device == "cuda":
        attention = torch.compile(attention)
    out = attention(*inputs, SCALE)
    expected = definition(*exact, SCALE)
    out.backward(do)
    expected.backward(do.double())

    q, k, v = (x.detach() for x in exact)
    magnitude = (attention_weights(q, k, SCALE) @ v.abs().unsqueeze(-1)).squeeze(-1)
    assert ((out - expected).abs() <= 1e-5 * magnitude).all()
    magnitudes = gradient_magnitudes(q, k, v, do.double(), SCALE)
    for name, x, x64, total in zip("qkv", inputs, exact, magnitudes, strict=True):
        error = (x.grad - x64.grad).abs()
        assert (error <= 1e-5 * total + 1e-30).all(), f"d{name}: {(error / total).max():.1e}"


@pytest.mark.parametrize("largest_score", [1.0, 1000.0])
@pytest.mark.parametrize("d_head", [1, 7, 56])
def test_attention_by_the_book_is_the_definition(d_head, largest_score):
    *qkv, do = random_inputs(d_head, largest_score)
    qkv = [x.double() for x in qkv]
    ours = [x.clone().requires_grad_() for x in qkv]
    reference = [x.clone().requires_grad_() for x in qkv]
    out = mini_vit.attention_by_the_book(*ours, SCALE)
    expected = naive_attention(*reference, SCALE)
    torch.testing.assert_close(out, expected)
    out.backward(do.double())
    expected.backward(do.double())
    for x, y in zip(ours, reference, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("attention", [naive_attention, mini_vit.attention_by_the_book])
def test_the_definition_is_a_sum_over_keys_for_each_query(attention):
    """Attention of one head, number by number."""
    q, k, v = torch.randn(3, 5, dtype=torch.double).unbind(0)
    expected = []
    for i in range(5):
        weights = [(0.7 * q[i] * k[j]).exp() for j in range(5)]
        expected.append(sum(weights[j] * v[j] for j in range(5)) / sum(weights))
    out = attention(q.view(1, 1, 5), k.view(1, 1, 5), v.view(1, 1, 5), 0.7)
    torch.testing.assert_close(out.flatten(), torch.stack(expected))


def test_equal_keys_give_the_mean_value():
    q, v = torch.randn(2, 4, 3, 56)
    k = torch.full((4, 3, 56), 1.7)
    out = mini_vit.scalar_attention(q * 1e3, k, v, 1.0)
    torch.testing.assert_close(out, v.mean(-1, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d_head", [1, 2, 7])
def test_gradcheck(d_head):
    qkv = [torch.randn(2, 2, d_head, dtype=torch.double, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *qkv: mini_vit.scalar_attention(*qkv, 0.7), qkv)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_images", [3, 700])  # sums_on_cpu splits 700 into several parts
@pytest.mark.parametrize("size", [1.0, 1000.0])
@pytest.mark.parametrize("over_keys", [True, False])
def test_sums_on_a_gpu_are_the_sums_on_a_cpu(over_keys, size, n_images, device):
    t, k, *vectors = torch.randn(6, n_images, 2, 30)
    t = t * size
    on_cpu = mini_vit.sums_on_cpu(t, k, vectors, over_keys)
    moved = [c.to(device) for c in vectors]
    on_gpu = mini_vit.sums_on_gpu(t.to(device), k.to(device), moved, over_keys)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        # The error of an exponent grows with the score.
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)


def test_memory_for_the_backward_pass_grows_with_d_head_not_its_square():
    def saved_numbers(d_head):
        total = 0

        def count(x):
            nonlocal total
            total += x.numel()
            return x

        q, k, v = (torch.randn(2, 3, d_head, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            mini_vit.scalar_attention(q, k, v, 1.0)
        return total

    assert saved_numbers(80) == 2 * saved_numbers(40)


@pytest.mark.parametrize("script", SCRIPTS[:3], indirect=True)
def test_the_block_computes_what_the_original_computes(module):
    """Same weights, same logits as the loop over heads."""
    embd = 800 if module.__name__ == "mini_vit_concat" else 56
    config = module.Config(n_layers=2, n_head=4, d_head=embd // 4, n_embd=embd)
    torch.manual_seed(0)
    ours = module.Transformer(config).eval()
    for parameter in ours.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))  # scores that matter
    expected = with_attention(module.Transformer(config), config, HeadByHead).eval()
    expected.load_state_dict(ours.state_dict(), strict=False)
    for block, reference in zip(ours.blocks, expected.blocks, strict=True):
        # q, k, v; head-major
        weights = block.attn.qkv.weight.view(3, config.n_head, config.d_head, config.n_embd)
        for head, (q, k, v) in zip(reference.attn.heads, weights.unbind(1), strict=True):
            head.q.weight.data = q
            head.k.weight.data = k
            head.v.weight.data = v
    images = torch.rand(5, 784)
    torch.testing.assert_close(ours(images), expected(images), rtol=1e-4, atol=1e-4)
