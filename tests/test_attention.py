"""scalar_attention is exact, forward and backward, for any finite scores."""

import pytest
import torch
from conftest import SCRIPTS
from reference import HeadByHead, naive_attention, with_attention

import mini_vit

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def weighted_sums(q, k, v, do, scale):
    """Return the gradients' sums taken over absolute values: what rounding errors are relative to."""
    p = (scale * q.unsqueeze(-1) * k.unsqueeze(-2)).softmax(-1)
    o = (p @ v.unsqueeze(-1)).squeeze(-1)
    ds = do.abs().unsqueeze(-1) * p * (v.unsqueeze(-2).abs() + o.unsqueeze(-1).abs())  # |dS_ij|
    dq = (ds * k.unsqueeze(-2).abs()).sum(-1) * scale
    dk = (ds * q.unsqueeze(-1).abs()).sum(-2) * scale
    dv = (p * do.abs().unsqueeze(-1)).sum(-2)
    return dq, dk, dv


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("largest_score", [0.0, 1e-3, 1.0, 15.0, 100.0, 1000.0])
@pytest.mark.parametrize("d_head", [1, 2, 7, 56, 98])
def test_output_and_gradients_match_float64(d_head, largest_score, device):
    generator = torch.Generator().manual_seed(d_head)
    q, k, v, do = torch.randn(4, 50, 3, d_head, generator=generator).to(device)
    scale = 784**-0.5
    top = (q.abs().amax(-1) * k.abs().amax(-1)).amax()
    q = q * (largest_score / scale / top)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    attention = torch.compile(mini_vit.scalar_attention) if device == "cuda" else mini_vit.scalar_attention
    out, expected = attention(*inputs, scale), naive_attention(*exact, scale)
    out.backward(do)
    expected.backward(do.double())
    p = (scale * exact[0].unsqueeze(-1) * exact[1].unsqueeze(-2)).softmax(-1)
    magnitude = (p @ exact[2].abs().unsqueeze(-1)).squeeze(-1)
    assert ((out - expected).abs() <= 1e-5 * magnitude).all()
    sums = weighted_sums(*(x.detach() for x in exact), do.double(), scale)
    for name, x, x64, total in zip("qkv", inputs, exact, sums, strict=True):
        error = (x.grad - x64.grad).abs()
        assert (error <= 1e-5 * total + 1e-30).all(), f"d{name}: {(error / total).max():.1e}"


def test_equal_keys_give_the_mean_value():
    q, v = torch.randn(2, 4, 3, 56)
    k = torch.full((4, 3, 56), 1.7)
    out = mini_vit.scalar_attention(q * 1e3, k, v, 1.0)
    torch.testing.assert_close(out, v.mean(-1, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d_head", [1, 2, 7])
def test_gradcheck(d_head):
    q, k, v = (torch.randn(2, 2, d_head, dtype=torch.double, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda *x: mini_vit.scalar_attention(*x, 0.7), (q, k, v))


@pytest.mark.parametrize("size", [1.0, 1000.0])
@pytest.mark.parametrize("over_keys", [True, False])
def test_sums_on_a_gpu_are_the_sums_on_a_cpu(over_keys, size):
    """CUDA takes another way through weighted_sums; tell it that this CPU tensor is on a GPU."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    t, k, *columns = torch.randn(6, 3, 2, 7)
    t *= size
    here = mini_vit.weighted_sums(t, k, columns, over_keys)
    there = mini_vit.weighted_sums(t.as_subclass(OnGPU), k, columns, over_keys)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.as_subclass(torch.Tensor))


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
    images = torch.rand(5, 784)
    expected = with_attention(module.Transformer(config), config, HeadByHead).eval()
    expected.load_state_dict(ours.state_dict(), strict=False)
    for block, reference in zip(ours.blocks, expected.blocks, strict=True):
        weights = block.attn.qkv.weight.view(3, config.n_head, config.d_head, config.n_embd)  # q, k, v; head-major
        for head, (q, k, v) in zip(reference.attn.heads, weights.unbind(1), strict=True):
            head.q.weight.data, head.k.weight.data, head.v.weight.data = q, k, v
    torch.testing.assert_close(ours(images), expected(images), rtol=1e-4, atol=1e-4)
