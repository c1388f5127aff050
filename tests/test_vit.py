"""vit.py is the Vision Transformer of the paper: it computes what torchvision's computes.

So, with an internet connection, torchvision's trained ImageNet weights can be loaded. Start Python
with `PYTHONPATH=tests python` beside vit.py:

    import vit; from test_vit import renamed; from torchvision.models import vit_b_16
    sizes = {"n_embd": 768, "n_head": 12, "n_layers": 12, "classes": 1000}
    model = vit.Transformer(vit.Config(image_size=224, patch_size=16, channels=3, **sizes))
    model.load_state_dict(renamed(vit_b_16(weights="DEFAULT").state_dict()))

The model expects images preprocessed by torchvision's ViT_B_16_Weights.DEFAULT.transforms().
"""

import re

import pytest
import torch
from torchvision.models import VisionTransformer, vit_b_16

import vit

NAMES = {
    "encoder.pos_embedding": "position",
    "encoder.layers.encoder_layer_": "blocks.",
    "encoder.ln": "ln",
    "conv_proj": "embed",
    "heads.head": "head",
    "ln_1": "ln1",
    "ln_2": "ln2",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "mlp.0": "ff.0",
    "mlp.3": "ff.2",
}


def renamed(weights: dict) -> dict:
    """Return the weights of torchvision's VisionTransformer as vit.py names and shapes them."""
    ours = {}
    for name, value in weights.items():
        for theirs, new in NAMES.items():
            name = name.replace(theirs, new)
        ours[name] = value
    # A convolution's weights have shape (n_embd, channels, patch, patch).
    ours["embed.weight"] = ours["embed.weight"].flatten(1)
    ours["class_token"] = ours["class_token"].flatten()
    ours["position"] = ours["position"][0]
    return ours


def randomized(model: torch.nn.Module, size: float) -> torch.nn.Module:
    """Return the model with random weights, another seed for each tensor, none left at 0 or 1."""
    for seed, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(seed)
        parameter.data = size * torch.randn(parameter.shape, generator=generator) + 0.02
    return model.eval()


def assert_same_logits(theirs: torch.nn.Module, spread: float, **shape) -> vit.Transformer:
    """See that vit.py computes the logits of torchvision's model; return vit.py's model."""
    config = vit.Config(channels=3, classes=1000, precision="float32", **shape)
    ours = vit.Transformer(config).eval()
    ours.load_state_dict(renamed(randomized(theirs, spread).state_dict()))
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(2, 3, config.image_size, config.image_size, generator=generator)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
    assert (expected[0] - expected[1]).abs().max() > 5e-4
    return ours


def test_it_computes_torchvision_s_logits():
    theirs = VisionTransformer(
        image_size=30, patch_size=5, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=192
    )
    shape = {"image_size": 30, "patch_size": 5, "n_layers": 3, "n_head": 3, "n_embd": 48}
    assert_same_logits(theirs, 0.2, **shape)


@pytest.mark.slow
def test_it_computes_the_logits_of_vit_b_16():
    shape = {"image_size": 224, "patch_size": 16, "n_layers": 12, "n_head": 12, "n_embd": 768}
    ours = assert_same_logits(vit_b_16(weights=None), 0.05, **shape)
    assert sum(p.numel() for p in ours.parameters()) == 86_567_656


@pytest.mark.parametrize("n_tokens", [2, 17])
def test_attention_on_a_gpu_is_attention_on_a_cpu(n_tokens):
    """MultiHead has a separate path for CUDA; pretend that this CPU tensor is on a GPU."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    attention = vit.MultiHead(vit.Config(n_head=4, n_embd=32))
    x = torch.randn(3, n_tokens, 32)
    with torch.no_grad():
        there = attention(x.as_subclass(OnGPU)).as_subclass(torch.Tensor)
        torch.testing.assert_close(attention(x), there)


@pytest.mark.slow
def test_a_short_training_passes_98_5_percent(run):
    lines = run("vit", "--max_iters", "1000", "--device", "cpu").stdout.splitlines()
    correct = int(re.fullmatch(r"accuracy: \S+% \((\d+) of 10000\)", lines[-1])[1])
    assert correct > 9850
