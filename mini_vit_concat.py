"""mini-ViT, concatenated: every block sees the original image again, beside what the block before made of it.

    python mini_vit_concat.py                  # train, on the GPU if there is one
    diff mini_vit.py mini_vit_concat.py        # the experiment
    python mini_vit_concat.py --resume         # go on after a stop; torchrun and all flags as in mini_vit.py

The question: does the image itself, given to each block anew, help? The embedding is twice as wide for it, with
492,622,490 parameters. It came to 98.78 ± 0.02 % on the test set (seeds 1 to 3), after 5 passes, trained on adversarial
images in bfloat16, in 113 seconds on an NVIDIA H100 that it shared (torch 2.11.0); on two cores of an AMD EPYC (torch
2.15.0), to 98.74 and 98.78 %, in 31 and 33 minutes. mini_vit.py, made as wide, came to 98.81 % in as many steps (seed
1, on the EPYC). So the answer is no. The original found no gain, either.
"""

import argparse
import csv
import ctypes
import inspect
import itertools
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision import datasets
from tqdm import tqdm

SCRIPT = Path(__file__).stem
LOG_COLUMNS = "iter", "learning_rate", "train_loss", "test_loss", "test_accuracy", "images_per_second", "seconds"
LOG_LINE = (
    "step {iter}: train loss {train_loss:.4f}, test loss {test_loss:.4f}, test accuracy {test_accuracy:.2%}, "
    "{images_per_second:.0f} images/s, {seconds:.0f} s"
)
BAR = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
LOG_INTERVAL = 10  # steps from one look at the loss to the next
SAVE_SECONDS = 300  # most seconds that a crash may cost
SAVE_SHARE = 0.1  # of the time, at most, for saving and drawing between the first and the last evaluation
# What --resume, --eval and --classify may change of a saved run.
CHANGEABLE = "batch_size", "max_iters", "eval_interval", "device", "precision", "compile", "data_dir", "out_dir"

# ---------------------------------------------------------------------------- hyperparameters


@dataclass
class Config:
    """Everything a run depends on; each line is also a flag of the same name."""

    batch_size: int = 256  # images per optimizer step, over all processes; lower it when memory runs out
    max_iters: int = 1200  # optimizer steps; 60000 / batch_size of them are one pass over the training set
    eval_interval: int = 500  # optimizer steps from one evaluation and log line to the next
    learning_rate: float = 3e-4  # peak of AdamW's
    warmup_iters: int = 200  # optimizer steps until the peak; from there a cosine decays to 0 at max_iters
    weight_decay: float = 0.05  # AdamW's, on matrices only
    beta2: float = 0.98  # AdamW's average of squared gradients; below the usual 0.999 since runs are short
    grad_clip: float = 1.0  # largest norm of the gradient
    dropout: float = 0.1  # after attention and after feed-forward, in every block
    adversarial: float = 0.1  # training images get each pixel changed by so much, to raise the loss; 0 is faster
    n_head: int = 16  # attention heads; n_head * d_head must be n_embd
    d_head: int = 98  # features per head; each one is a token
    n_embd: int = 1568  # features of one image, the last 784 of them its pixels; more than 784
    n_layers: int = 16  # blocks
    first_layers: int = 1  # blocks in use at first
    growth: float = 4.0  # blocks in use later: n_layers * (step / max_iters) ** growth, rounded up; 0 is all at once
    seed: int = 1  # of weights, order of images and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps; auto is CUDA, else MPS, else the CPU
    precision: str = "auto"  # of matrix products: float32, bfloat16; auto is bfloat16 on CUDA and AVX512-BF16 CPUs
    compile: str = "auto"  # torch.compile, on or off; auto is on for CUDA
    data_dir: str = "data"  # holds MNIST/raw/*.gz
    out_dir: str = f"runs/{SCRIPT}"  # gets checkpoint.pt, model.pt, log.csv and report.png
    subset: int = 0  # train and test on the first so many images of each set; 0 is all
    holdout: int = 0  # test on so many last training images, kept out of training, not on the test set

    def __post_init__(self):
        """Raise ValueError, one line, for a value out of range; torch's integers end at 2**63."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is not str and not (0 <= value < 2**63 and (value or f.name not in POSITIVE)):
                raise ValueError(f"{f.name} can't be {value}")
            if f.name in BELOW_ONE and value >= 1:
                raise ValueError(f"{f.name} must be below 1, not {value}")
            if f.name in CHOICES and value not in CHOICES[f.name]:
                raise ValueError(f"{f.name} must be {' or '.join(CHOICES[f.name])}, not {value}")
        if self.n_head * self.d_head != self.n_embd:
            raise ValueError(f"n_head * d_head must be n_embd: {self.n_head} * {self.d_head} is not {self.n_embd}")
        if self.n_embd <= 784:
            raise ValueError(f"n_embd must be more than the image's 784, not {self.n_embd}")


POSITIVE = "batch_size max_iters eval_interval learning_rate grad_clip".split()
POSITIVE += "n_head d_head n_embd n_layers first_layers".split()
BELOW_ONE = "beta2", "dropout"
CHOICES = {"precision": ("auto", "float32", "bfloat16"), "compile": ("auto", "on", "off")}


def fail(message: str):
    """End with one line on stderr and exit status 1."""
    sys.stdout.flush()
    raise SystemExit(f"{SCRIPT}.py: error: {message}")


# ---------------------------------------------------------------------------- data


def load_mnist(config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images (N, 784) uint8, their labels (N,) int64, and the same for testing.

    torchvision checks the four archives' MD5 sums and unpacks them, here into a folder of its own each
    time: so no run can see a file that another is still unpacking, or that somebody damaged since.
    """
    raw = Path(config.data_dir, "MNIST", "raw")
    try:
        with tempfile.TemporaryDirectory() as folder:
            (copy := Path(folder, "MNIST", "raw")).mkdir(parents=True)
            for archive in raw.glob("*.gz"):
                shutil.copy(archive, copy)
            train, test = (datasets.MNIST(folder, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError, EOFError) as error:
        fail(f"can't load MNIST from {raw} ({str(error).splitlines()[0]} ...); restore the archives or set --data_dir")
    sets = [(s.data.flatten(1)[: config.subset or None], s.targets[: config.subset or None]) for s in (train, test)]
    if config.holdout:
        if config.holdout >= len(sets[0][0]):
            fail(f"holdout {config.holdout} leaves none of the {len(sets[0][0])} training images")
        sets = [[x[: -config.holdout] for x in sets[0]], [x[-config.holdout :] for x in sets[0]]]
    return *sets[0], *sets[1]


def shuffled_indices(n_images: int, config: Config, start: int) -> Iterator[Tensor]:
    """Yield (batch_size,) indices per iteration, from iteration `start` on; each pass takes each image once.

    The order depends on the seed and the iteration alone, so that a resumed run goes on where it stopped.
    """
    first_pass, skip = divmod(start * config.batch_size, n_images)
    order = torch.empty(0, dtype=torch.long)
    for n_pass in itertools.count(first_pass):
        generator = torch.Generator().manual_seed(hash((config.seed, n_pass)))
        order = torch.cat([order, torch.randperm(n_images, generator=generator)[skip:]])
        skip = 0
        while len(order) >= config.batch_size:
            yield order[: config.batch_size]
            order = order[config.batch_size :]


def training_batches(images: Tensor, labels: Tensor, config: Config, start: int, device, rank, world) -> Iterator:
    """Yield this process's share, (images, labels) on the device, of each batch from iteration `start` on."""
    images, labels = images.to(device), labels.to(device)  # 47 MB: the whole set lives on the device
    for indices in shuffled_indices(len(images), config, start):
        share = indices[rank::world].to(device)
        yield images[share], labels[share]


# ---------------------------------------------------------------------------- model


def weighted_sums(t: Tensor, k: Tensor, columns: list[Tensor], over_keys: bool) -> list[Tensor]:
    """Return Σ_j E_ij c_j or, not over keys, Σ_i E_ij c_i of each c, (B, n_head, d_head).

    E_ij = exp(t_i k_j - max_j t_i k_j). The largest score of row i is t_i times the largest k or, where t_i is
    negative, times the smallest. The differences from that k come first, so large scores stay exact.
    """
    t = t * math.log2(math.e)  # exp2 takes less time than exp on a CPU
    largest, smallest = k.amax(-1, keepdim=True), k.amin(-1, keepdim=True)
    if t.is_cuda:  # torch.compile fuses it all: E never reaches memory
        edge = torch.where(t > 0, largest, smallest)  # of each row: the k of its largest score
        weights = (t.unsqueeze(-1) * (k.unsqueeze(-2) - edge.unsqueeze(-1))).exp2()
        weights = weights if over_keys else weights.mT
        return [(weights * c.unsqueeze(-2)).sum(-1) for c in columns]
    rows = torch.stack([t.clamp(min=0), t.clamp(max=0)], -1)  # (B, n_head, i, 2): t_i in one column, 0 in the other
    keys = torch.stack([k - largest, k - smallest], -2)  # (B, n_head, 2, j)
    columns = torch.stack(columns, -2)
    sums = torch.empty_like(columns)
    n_images = max(1, 700_000 // (t.shape[1] * t.shape[2] ** 2))  # so many images' exps stay in a CPU's cache
    with torch.autocast(t.device.type, enabled=False):
        for a, b, c, out in zip(*(x.split(n_images) for x in (rows, keys, columns, sums)), strict=True):
            weights = (a @ b).exp2_()
            out.copy_(c @ (weights.mT if over_keys else weights))  # 4 times as fast on a CPU as weights @ c
    return sums.unbind(-2)


class RankOneAttention(torch.autograd.Function):
    """softmax_j(t_i k_j) v_j with O(d_head) memory per row: scores of width-1 tokens are an outer product.

    With E_ij = exp(t_i k_j - max), n = Σ_j E_ij, P = E / n and o = Pv, the gradients are, with g = do / n,
    dt = do · (P(v·k) - o · Pk), dv = Eᵀg and dk = v · Eᵀ(g·t) - Eᵀ(g·o·t). The backward pass computes E again,
    the idea of FlashAttention (Dao et al. 2022, arXiv:2205.14135).
    """

    @staticmethod
    def forward(ctx, t: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, *sums = weighted_sums(t, k, [torch.ones_like(k), v, k, v * k], over_keys=True)
        o, pk, pvk = (s / n for s in sums)
        ctx.save_for_backward(t, k, v, n, o, pvk - o * pk)
        return o

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, k, v, n, o, slope = ctx.saved_tensors
        g = do / n
        a, b, c = weighted_sums(t, k, [g, g * t, g * o * t], over_keys=False)
        return do * slope, v * b - c, a


def scalar_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return softmax_j(scale q_i k_j) v_j, exact, for q, k, v of shape (B, n_head, d_head).

    Each of a head's d_head features is a token of width 1.
    """
    return RankOneAttention.apply(q * scale, k, v)


class MultiHead(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.n_head, self.scale = config.n_head, config.n_embd**-0.5
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).to(x.dtype)  # under autocast, scores and softmax stay in float32
        return qkv.unflatten(-1, (3, self.n_head, -1)).unbind(1)  # q, k, v: (B, n_head, d_head) each

    def forward(self, x: Tensor) -> Tensor:  # (B, n_embd)
        return self.dropout(self.proj(scalar_attention(*self.heads(x), self.scale).flatten(1)))


class FeedForward(nn.Sequential):
    def __init__(self, config: Config):
        up, down = nn.Linear(config.n_embd, 4 * config.n_embd), nn.Linear(4 * config.n_embd, config.n_embd)
        super().__init__(up, nn.GELU(), down, nn.Dropout(config.dropout))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(config.n_embd), MultiHead(config)
        self.ln2, self.ff = nn.LayerNorm(config.n_embd), FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.ff(self.ln2(x))


class Transformer(nn.Module):
    img_size = 28 * 28

    def __init__(self, config: Config):
        super().__init__()
        self.mixed_precision = config.precision == "bfloat16"
        self.embed = nn.Linear(self.img_size, config.n_embd - self.img_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.reduce = nn.ModuleList(
            nn.Linear(config.n_embd, config.n_embd - self.img_size) for _ in range(config.n_layers)
        )
        self.depth = config.n_layers  # blocks in use: the first so many
        self.ln = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, 10)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # what writes into the residual stream starts smaller, as in GPT-2
                writes = name.endswith(("proj.weight", "ff.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layers) if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for reduce in self.reduce:
            nn.init.eye_(reduce.weight)  # a new block begins by passing on what it gets

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 10) of images (B, 784), uint8 or pixels in [0, 1]."""
        image = images / 255 if images.dtype == torch.uint8 else images
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.mixed_precision):
            x = torch.cat([self.embed(image), image], -1)
            for block, reduce in zip(self.blocks[: self.depth], self.reduce, strict=False):
                x = torch.cat([reduce(block(x)), image], -1)  # every block's input ends with the image itself
            return self.head(self.ln(x)).float()


# ---------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 2000) -> tuple[float, Tensor]:
    """Return the mean cross-entropy and the probabilities (N, 10), in eval mode, each of N images counted once."""
    model.eval()
    logits = torch.cat([model(part) for part in images.split(batch_size)])
    model.train()
    return F.cross_entropy(logits, labels).item(), logits.softmax(-1)


def likeliest(probabilities: Tensor) -> str:
    """Return the three likeliest digits of probabilities (10,) as text."""
    values, digits = probabilities.topk(3)
    return "   ".join(f"{d}: {100 * p:6.2f}%" for d, p in zip(digits.tolist(), values.tolist(), strict=True))


def print_results(probabilities: Tensor, labels: Tensor, seed: int) -> None:
    """Print ten random test digits, each with its three likeliest labels, and at last the accuracy."""
    for i in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:10].tolist():
        print(f"test digit {i:5d} is a {labels[i]}, the model says   {likeliest(probabilities[i])}")
    correct = int((probabilities.argmax(-1) == labels).sum())
    print(f"accuracy: {100 * correct / len(labels):.2f}% ({correct} of {len(labels)})")


# ---------------------------------------------------------------------------- training


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: getting it anew from the system costs page faults."""
    if sys.platform == "linux" and hasattr(glibc := ctypes.CDLL(None), "mallopt"):
        glibc.mallopt(-4, 0)  # M_MMAP_MAX: also large blocks come from the heap
        glibc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def set_up(config: Config) -> tuple[torch.device, int, int]:
    """Return the device, this process's rank and the number of processes, joined if torchrun started several."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and world > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
        torch.zeros(1, device=device).item()  # not every device that torch knows can be read
    except (RuntimeError, AssertionError) as error:
        fail(f"device {name} can't be used: {str(error).splitlines()[0]}")
    if config.batch_size % world:
        fail(f"batch_size {config.batch_size} can't be split evenly over {world} processes")
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device, rank, world


def new_model(config: Config, device: torch.device) -> Transformer:
    """Return a Transformer with new weights on the device, in the precision that suits it."""
    torch.manual_seed(config.seed)
    model = Transformer(config).to(device)
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    if config.precision == "auto":
        model.mixed_precision = device.type == "cuda" or cpu.get("avx512_bf16", False)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, where precision is float32
    elif not model.mixed_precision and cpu.get("avx512_bf16") and not cpu.get("amx_tile"):
        torch.set_float32_matmul_precision("medium")  # still float32 without AMX, but by oneDNN: faster than MKL on AMD
    return model


def build(config: Config, device: torch.device, state: dict) -> tuple[Transformer, torch.optim.AdamW]:
    """Return model and optimizer, new ones or, if it isn't empty, those of the checkpoint `state`."""
    model = new_model(config, device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, config.beta2), fused=True)
    if state:
        restore(model, state)
        optimizer.load_state_dict(state.pop("optimizer"))
    for group in optimizer.param_groups:  # a CUDA graph reads the learning rate from the GPU's memory
        group.update(lr=torch.zeros((), device=device), capturable=device.type == "cuda")
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        try:
            torch.compile(torch.sin)(torch.zeros(1, device=device))
        except RuntimeError as error:
            print(f"going on without torch.compile, which can't work here: {str(error).splitlines()[0]}")
        else:  # block by block: they share their code, so the compiler works once, not n_layers times
            for block in model.blocks:
                block.compile(dynamic=False)
    return model, optimizer


def learning_rate_at(step: int, config: Config) -> float:
    """Return the learning rate of a step: linear warmup, then cosine decay to 0 at the last step, max_iters."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def depth_at(step: int, config: Config) -> int:
    """Return how many blocks are in use at a step: few at first, all n_layers at the last step, max_iters.

    A shallow network learns faster, per step and still more per second. A new block's output is small, as
    initialized: so what the others have learned stays valid (cf. progressive stacking, Gong et al. 2019).
    """
    blocks = math.ceil(config.n_layers * (step / config.max_iters) ** config.growth)
    return min(max(config.first_layers, blocks), config.n_layers)


class StopSignal:
    """Remembers the first Ctrl-C or SIGTERM, so that training stops between two steps; the second ends at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        signal.signal(number, signal.SIG_DFL)
        self.number = number


def agree(loss: Tensor, stop: StopSignal, world: int) -> tuple[Tensor, int]:
    """Return the loss averaged over all processes and the signal, or 0, that any of them got."""
    if world == 1:
        return loss, stop.number
    number = torch.tensor(stop.number)  # on the CPU, so that reading it doesn't wait for the GPU
    dist.all_reduce(number, dist.ReduceOp.MAX)
    dist.all_reduce(loss)
    return loss / world, int(number)


def resume_command(config: Config, world: int) -> str:
    """Return the command that goes on with this run."""
    start = f"torchrun --standalone --nproc_per_node={world}" if world > 1 else "python"
    place = "" if config.out_dir == Config.out_dir else f" --out_dir {shlex.quote(config.out_dir)}"
    return f"{start} {shlex.quote(sys.argv[0])} --resume{place}"


def adversarial(model: Transformer, images: Tensor, labels: Tensor, size: float) -> Tensor:
    """Return pixels (B, 784) of uint8 images, each pixel changed by ± size, whichever raises the loss.

    This is the fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572).
    """
    pixels = (images / 255).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(pixels), labels), pixels)
    return (pixels + size * gradient.sign()).detach()


def training_step(
    model: Transformer,
    parallel: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    """Train on one batch and return its loss, NaN if that or its gradient is not finite.

    parallel is the model itself or, with several processes, DistributedDataParallel around it.
    """
    if config.adversarial:
        images = adversarial(model, images, labels, config.adversarial)
    loss = F.cross_entropy(parallel(images), labels)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach() + 0 * norm


class Recorded:
    """Replays a training step as one CUDA graph: to launch its kernels one by one takes longer than to run them.

    It is recorded anew for each depth, after three steps that run as usual, compile, and make AdamW's averages.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], model: Transformer):
        self.step, self.model, self.depth, self.graph = step, model, 0, None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.depth != self.model.depth:
            self.depth, self.graph, self.usual = self.model.depth, None, 3
        if self.usual:
            self.usual -= 1
            return self.step(images, labels)
        if not self.graph:
            self.batch, self.graph = (images.clone(), labels.clone()), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may pin memory
                self.loss = self.step(*self.batch)
        for recorded, new in zip(self.batch, (images, labels), strict=True):
            recorded.copy_(new)
        self.graph.replay()
        return self.loss


def step_function(
    model: Transformer, optimizer: torch.optim.Optimizer, config: Config, device: torch.device, world: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return training_step as a function of images and labels, data-parallel or, on one GPU, recorded."""
    parallel = model
    if world > 1:  # blocks that are not in use yet get no gradient: DDP must not wait for one
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=config.growth > 0)
    step = partial(training_step, model, parallel, optimizer, config)
    return Recorded(step, model) if device.type == "cuda" and world == 1 else step


def describe(model: Transformer, device: torch.device, world: int) -> None:
    """Print what trains: device, precision, number of processes and of parameters."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    precision = "bfloat16" if model.mixed_precision else "float32"
    print(f"device: {device} ({kind}), {precision}" + f", {world} processes" * (world > 1))
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)


def train(config: Config, state: dict) -> None:
    """Train, from the checkpoint `state` on if it isn't empty, and write config.out_dir."""
    device, rank, world = set_up(config)
    stop, out = StopSignal(), Path(config.out_dir)
    train_images, train_labels, *test_set = load_mnist(config)
    test_images, test_labels = (x.to(device) for x in test_set)
    model, optimizer = build(config, device, state)
    if rank == 0:
        describe(model, device, world)
    step_on = step_function(model, optimizer, config, device, world)
    start, log, began = state.get("iter", 0), state.get("log", []), time.perf_counter() - state.get("seconds", 0.0)
    loss_sum = torch.tensor(state.get("loss_sum", 0.0), device=device)  # of the steps since the last evaluation
    batches = training_batches(train_images, train_labels, config, start, device, rank, world)
    depths = [max(state.get("depth", 1), depth_at(step, config)) for step in range(1, config.max_iters + 1)]
    # The bar, in a terminal only, counts blocks, not steps: so the time left is right although steps get slower.
    bar = tqdm(total=sum(depths), initial=sum(depths[:start]), disable=None if rank == 0 else True, bar_format=BAR)
    clock, clock_step, saved, saving = time.perf_counter(), start, time.perf_counter(), 0.0
    with closing(batches), bar:
        for step in range(start + 1, config.max_iters + 1):
            images, labels = next(batches)
            torch.manual_seed(hash((config.seed, step, rank)))  # dropout depends on the step alone: resuming is exact
            for group in optimizer.param_groups:
                group["lr"].fill_(rate := learning_rate_at(step, config))
            model.depth = depths[step - 1]
            loss = step_on(images, labels)
            loss, stopped = agree(loss, stop, world)
            loss_sum += loss
            bar.update(model.depth)
            evaluating = step % config.eval_interval == 0 or step == config.max_iters
            if step % LOG_INTERVAL and not evaluating and not stopped:
                continue  # to look at the loss would make the CPU wait for the GPU
            if not loss_sum.isfinite():
                fail(f"the loss is not finite at step {step}: lower learning_rate; the last checkpoint is kept")
            speed = (step - clock_step) * config.batch_size / (time.perf_counter() - clock)
            status = f"step {step}, loss {loss:.4f}, lr {rate:.1e}, {speed:.0f} images/s"
            bar.set_postfix_str(status, refresh=False)
            if evaluating and rank == 0:
                test_loss, probabilities = evaluate(model, test_images, test_labels)
                accuracy = (probabilities.argmax(-1) == test_labels).float().mean().item()
                train_loss = loss_sum.item() / (step - (log[-1]["iter"] if log else 0))
                row = step, rate, train_loss, test_loss, accuracy, speed, time.perf_counter() - began
                log.append(dict(zip(LOG_COLUMNS, row, strict=True)))
                write_log(log, out / "log.csv")
                bar.write(LOG_LINE.format(**log[-1]))
            if evaluating:
                loss_sum.zero_()
            began_saving = time.perf_counter()
            patience = min(saving / SAVE_SHARE, SAVE_SECONDS) if evaluating else SAVE_SECONDS
            due = step == config.max_iters or stopped or began_saving - saved > patience
            if rank == 0 and due:
                run = {"script": SCRIPT, "config": asdict(config), "iter": step}
                run |= {"depth": model.depth, "model": model.state_dict()}
                progress = {"log": log, "loss_sum": loss_sum.item(), "seconds": time.perf_counter() - began}
                save(run | progress | {"optimizer": optimizer.state_dict()}, out / "checkpoint.pt")
                if evaluating:
                    save(run, out / "model.pt")
                    draw_report(model, log, test_images, test_labels, probabilities, out / "report.png")
                saved = time.perf_counter()
                saving = saved - began_saving
            if evaluating:
                clock, clock_step = time.perf_counter(), step
            if stopped and step < config.max_iters:
                break
    if stopped and step < config.max_iters:
        if rank == 0:
            print(f"stopped after step {step}; to go on: {resume_command(config, world)}")
        sys.exit(128 + stopped)
    if rank == 0:
        print_results(probabilities.cpu(), test_labels.cpu(), config.seed)
    if world > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- reporting


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, then rename it: neither a reader nor a crash ever meets half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # its own: two runs may share the folder
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(f"can't write {path} ({error.strerror}); what stood there before is unharmed")


def save(state: dict, path: Path) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch covers a full disk's OSError with an error of its own
            raise error.__context__ or error from None


def claim_folder(config: Config, mode: argparse.Namespace) -> None:
    """Make out_dir and see that it can be written and that no other run is in it, unless that is wanted."""
    out = Path(config.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if mode.overwrite:
            for name in ("log.csv", "checkpoint.pt", "model.pt", "report.png"):
                (out / name).unlink(missing_ok=True)
        open(out / "log.csv", "a" if mode.resume else "x").close()
    except OSError as error:
        if isinstance(error, FileExistsError) and out.is_dir():
            fail(f"{out} holds a run: go on with --resume, replace it with --overwrite, or choose another --out_dir")
        fail(f"can't write into {out}: {error.strerror}")


def load(folder: str, name: str) -> dict:
    """Return a state that a run wrote into a folder."""
    path = Path(folder, name)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path} is not there: train first, or name the folder with --out_dir")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        fail(f"{path} can't be read: it is damaged or no checkpoint ({type(error).__name__})")
    if not isinstance(state, dict) or state.get("script") != SCRIPT:
        fail(f"{path} is not from {SCRIPT}.py")
    if state["config"].keys() != {f.name for f in fields(Config)}:
        fail(f"{path} is from another version of {SCRIPT}.py: its Config has other fields")
    return state


def restore(model: Transformer, state: dict) -> None:
    """Move a saved state's weights into the model, and use as many blocks as that run did."""
    try:
        model.load_state_dict(state.pop("model"))
    except RuntimeError:
        fail(f"the saved weights don't fit the Transformer in {SCRIPT}.py: was it changed since?")
    model.depth = state["depth"]


def write_log(log: list[dict], path: Path) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, LOG_COLUMNS)
        writer.writeheader()
        writer.writerows(log)


def draw_report(model: Transformer, log: list[dict], images: Tensor, labels: Tensor, probabilities: Tensor, path: Path):
    """Draw learning curves, confusion matrix, the most confident mistakes, and attention, into one picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"no {path.name}: matplotlib is not installed")
    figure = Figure((12, 13), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(4, 3, 5))
    losses, accuracy, confusion = top.subplots(1, 3)

    curve = {name: [row[name] for row in log] for name in LOG_COLUMNS}
    losses.semilogy(curve["iter"], curve["train_loss"], "C0--o", label="training")
    losses.semilogy(curve["iter"], curve["test_loss"], "C0-o", label="test")
    losses.set(xlabel="step", title="cross-entropy")
    losses.legend()
    accuracy.plot(curve["iter"], [100 * x for x in curve["test_accuracy"]], "C1-o")
    accuracy.set(xlabel="step", title=f"test accuracy: {curve['test_accuracy'][-1]:.2%}")
    accuracy.set_ylabel("accuracy, %", color="C1")
    rate = accuracy.twinx()
    rate.plot(curve["iter"], curve["learning_rate"], "C2:")
    rate.set_ylabel("learning rate", color="C2")

    predicted = probabilities.argmax(-1)
    counts = torch.zeros(10, 10, dtype=torch.long).index_put_((labels.cpu(), predicted.cpu()), torch.tensor(1), True)
    confusion.imshow(counts.float().log1p(), cmap="Blues")
    for i, j in itertools.product(range(10), range(10)):
        if counts[i, j]:
            color = "w" if i == j else "k"
            confusion.text(j, i, counts[i, j].item(), ha="center", va="center", fontsize=8, color=color)
    confusion.set(xlabel="predicted", ylabel="true", xticks=range(10), yticks=range(10), title="test digits, counted")

    middle.suptitle("most confident mistakes: true → predicted")
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[probabilities[wrong].amax(-1).argsort(descending=True)]
    for axes, i in itertools.zip_longest(middle.subplots(2, 10).flat, wrong[:20].tolist()):
        axes.axis("off")
        if i is not None:
            axes.imshow(images[i].cpu().view(28, 28), cmap="gray")
            axes.set_title(f"{labels[i]} → {predicted[i]}\n{probabilities[i].max():.1%}", fontsize=9)

    bottom.suptitle("attention of one digit: each row is one feature (query), bright where it looks (keys)")
    axes = bottom.subplots(2, 4)
    axes[0, 0].imshow(images[0].cpu().view(28, 28), cmap="gray")
    axes[0, 0].set_title("the digit")
    for row, (place, block) in zip(axes, [("first", 0), ("last", model.depth - 1)], strict=True):
        attention = attention_matrix(model, images[:1], block)
        for head, ax in enumerate(row[1:]):
            if head < len(attention):
                ax.imshow(attention[head], cmap="viridis")
                ax.set(title=f"{place} block, head {head + 1}", xlabel="key: feature j", ylabel="query: feature i")
            else:
                ax.axis("off")
    axes[1, 0].axis("off")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=70)


def attention_matrix(model: Transformer, images: Tensor, block: int) -> Tensor:
    """Return the first image's attention weights, (n_head, d_head, d_head), in one block."""
    attn, seen = model.blocks[block].attn, []
    hook = attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.compiler.set_stance("force_eager"):
        evaluate(model, images, torch.zeros(len(images), dtype=torch.long, device=images.device), 1)
    hook.remove()
    with torch.no_grad():
        q, k, _ = attn.heads(seen[0])
        return (attn.scale * q[0, :, :, None] * k[0, :, None, :]).softmax(-1).cpu()


def read_digit(path: str) -> Tensor:
    """Return the digit of an image file in MNIST's form, (784,) uint8: light on dark, scaled into 20 x 20 pixels, and
    its centre of mass in the middle of 28 x 28 (LeCun et al. 1998). Raise OSError or ValueError if there is none."""
    image = ImageOps.exif_transpose(Image.open(path))
    image.thumbnail((800, 800))
    image = image.convert("RGBA")
    pixels = np.asarray(image, dtype=np.float32)
    alpha, gray = pixels[..., 3] / 255, pixels[..., :3] @ np.float32([0.299, 0.587, 0.114])
    paper = 0 if (gray * alpha).sum() > 127 * alpha.sum() else 255  # what is transparent contrasts with what is drawn
    gray = gray * alpha + paper * (1 - alpha) if alpha.min() < 1 else gray
    y, x = np.mgrid[-1 : 1 : len(gray) * 1j, -1 : 1 : gray.shape[1] * 1j].astype(np.float32)
    plane, margin = np.stack([np.ones_like(x), x, y], -1), np.maximum(abs(x), abs(y)) == 1
    light, *_ = np.linalg.lstsq(plane[margin], gray[margin])  # uneven light, as the image's edge tells it
    ink = gray - plane @ light
    ink = np.maximum(ink if (ink**3).sum() > 0 else -ink, 0)  # dark on light is inverted
    ink[ink < 0.25 * ink.max()] = 0  # paper and noise
    rows, columns = ink.any(1).nonzero()[0], ink.any(0).nonzero()[0]
    if not len(rows):
        raise ValueError("there is nothing in it")
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = [max(1, round(20 * n / max(ink.shape))) for n in ink.shape]
    ink = np.asarray(Image.fromarray(ink).resize(size[::-1], Image.Resampling.BILINEAR))
    centre = [(ink.sum(1 - axis) @ np.arange(n)) / ink.sum() for axis, n in enumerate(size)]
    top, left = (min(max(round(14 - c), 0), 28 - n) for c, n in zip(centre, size, strict=True))
    digit = np.zeros((28, 28), np.uint8)
    digit[top : top + size[0], left : left + size[1]] = (255 * ink / ink.max()).round()
    return torch.from_numpy(digit).flatten()


def classify(model: Transformer, paths: list[str], device: torch.device) -> int:
    """Print the three likeliest digits of each image file; return the exit status, 1 if a file was no image."""
    status = 0
    for path in paths:
        try:
            digit = read_digit(path)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            print(f"{SCRIPT}.py: error: {path}: {error}", file=sys.stderr)
            status = 1
            continue
        with torch.no_grad():
            print(f"{path}   {likeliest(model.eval()(digit[None].to(device)).softmax(-1)[0])}")
    return status


# ---------------------------------------------------------------------------- main


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """Return the mode (resume, overwrite, eval, classify) and those Config fields that the command line sets."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", action="store_true", help="go on from out_dir's checkpoint.pt, with its settings")
    modes.add_argument("--overwrite", action="store_true", help="start anew even where out_dir holds a run")
    modes.add_argument("--eval", action="store_true", help="evaluate out_dir's model.pt on the full test set")
    text = "print the three likeliest digits of each image, of any size and colour; dark on light is inverted"
    modes.add_argument("--classify", nargs="+", metavar="IMAGE", help=text)
    for f in fields(Config):
        text = f"{comments[f.name]} (default: {f.default})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=f.type, default=argparse.SUPPRESS, help=text, metavar=f.type.__name__)
    given = vars(parser.parse_args(argv))
    mode = argparse.Namespace(**{name: given.pop(name) for name in ("resume", "overwrite", "eval", "classify")})
    try:
        Config(**given)
    except ValueError as error:
        parser.error(str(error))
    return mode, given


def saved_config(state: dict, given: dict) -> Config:
    """Return a saved run's Config, with those given fields that don't change what it is."""
    config = Config(**state["config"] | {"out_dir": Config.out_dir})
    for name, value in given.items():
        if name not in CHANGEABLE and value != getattr(config, name):
            fail(f"the saved run has {name} {getattr(config, name)}, not {value}: leave out --{name} or start anew")
    return replace(config, **given)


def use_model(mode: argparse.Namespace, given: dict) -> int:
    """Evaluate or classify with a trained model.pt; return the exit status."""
    state = load(given.get("out_dir", Config.out_dir), "model.pt")
    config = replace(saved_config(state, given), subset=0, holdout=0)
    device, *_ = set_up(config)
    model = new_model(config, device)
    restore(model, state)
    if mode.classify:
        return classify(model, mode.classify, device)
    *_, images, labels = load_mnist(config)
    loss, probabilities = evaluate(model, images.to(device), labels.to(device))
    print(f"test loss: {loss:.4f}")
    right = probabilities.argmax(-1).cpu() == labels
    for digit in range(10):
        print(f"accuracy of {digit}: {right[labels == digit].double().mean():.2%}")
    print_results(probabilities.cpu(), labels, config.seed)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    mode, given = parse(argv)
    try:
        if mode.eval or mode.classify:
            return use_model(mode, given)
        state, config = {}, Config(**given)
        if mode.resume:
            state = load(config.out_dir, "checkpoint.pt")
            config = saved_config(state, given)
            if state["iter"] >= config.max_iters:
                fail(f"this run is finished ({state['iter']} steps): see --eval, or train longer with --max_iters")
        if os.environ.get("RANK", "0") == "0":
            claim_folder(config, mode)
        train(config, state)
        return 0
    except KeyboardInterrupt:
        return 130
    except (RuntimeError, MemoryError, ConnectionError) as error:  # the system may kill a worker, where there are any
        if isinstance(error, RuntimeError) and not re.search("(allocate|out of) memory|DataLoader worker", str(error)):
            raise
        fail("out of memory: lower batch_size")


if __name__ == "__main__":
    sys.exit(main())
