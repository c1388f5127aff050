"""mini-ViT, augmented: the model of mini_vit.py, trained on images that are never the same twice.

    python mini_vit_augment.py             # train, on a GPU if there is one; flags and torchrun as in mini_vit.py
    diff mini_vit.py mini_vit_augment.py   # the experiment

Trained on moved and bent digits, it comes to 99.51 % on the test set (seed 1) in 12 minutes on two cores of an Intel
Xeon with AMX (torch 2.15.0), and to 99.62 % in 152 seconds on an NVIDIA H200 (torch 2.11.0).
"""

import argparse
import ctypes
import gzip
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

SCRIPT = Path(__file__).stem
SAVE_SECONDS = 300  # the most training time that a crash may cost
SIGNALS = []  # Ctrl-C or SIGTERM, once training has received one
ERROR = f"{SCRIPT}.py: error:"  # begins the last line of a run that fails
CUDA = torch.cuda.is_available()  # without it, the defaults below are for two CPU cores


# ---------------------------------------------------------------------------- hyperparameters: each is also a flag
@dataclass
class Config:
    batch_size: int = 4096 if CUDA else 1024  # images per step, over all processes; lower it when memory runs out
    max_iters: int = 10000 if CUDA else 6000  # optimizer steps; 60000 / batch_size of them are one pass
    eval_interval: int = 500  # optimizer steps between two evaluations
    learning_rate: float = 1e-3  # peak of AdamW's; for all n_layers at once, 5e-4 is safer
    warmup_iters: int = 200  # optimizer steps until the peak; from there a cosine decays to 0 at max_iters
    weight_decay: float = 0.3  # AdamW's, on matrices only
    beta2: float = 0.98  # AdamW's average of squared gradients; below the usual 0.999 because runs are short
    grad_clip: float = 1.0  # largest norm of the gradient
    dropout: float = 0.0  # after attention and after feed-forward, in every block
    adversarial: float = 0.03 if CUDA else 0.0  # how far each pixel of an image is moved to raise the loss
    easy_share: float = 0.75  # share of each batch, that with the smallest loss, not trained on; 0 trains on all
    rotation: float = 16.0  # augmentation: largest angle, in degrees, either way
    scaling: float = 0.22  # augmentation: largest change of width and of height, as a share
    shear: float = 0.26  # augmentation: largest slant, horizontal pixels per vertical pixel
    translation: float = 2.0  # augmentation: largest shift along each axis, in pixels
    elastic: float = 0.8  # augmentation: standard deviation of the bending, in pixels
    num_workers: int = -1  # processes that make augmented batches; 0: the training process, -1: one per core, up to 16
    n_head: int = 14  # attention heads; n_head * d_head must be n_embd
    d_head: int = 56  # features per head; each one is a token
    n_embd: int = 784  # features of one image; other than 784 adds a linear layer before the first block
    n_layers: int = 16  # blocks
    first_layers: int = 4 if CUDA else 1  # blocks in use at first
    growth: float = 24.0 if CUDA else 60.0  # blocks used later: n_layers * (step / max_iters) ** growth; 0: all at once
    seed: int = 1  # of weights, order of images and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps; auto is CUDA, else MPS, else the CPU
    precision: str = "auto"  # of matrix products: float32, bfloat16; auto is bfloat16 where the hardware has it
    compile: str = "auto"  # torch.compile, on or off; auto is on for CUDA
    data_dir: str = str(Path(__file__).with_name("data"))  # holds MNIST/raw/*.gz
    out_dir: str = f"runs/{SCRIPT}"  # gets the run's files; if this default holds a run, the next free -2, -3, ...
    subset: int = 0  # train and test on the first so many images of each set; 0 is all
    holdout: int = 0  # test on so many last training images, kept out of training, not on the test set

    def __post_init__(self):
        """Raise ValueError, one line that names the field, for a value that breaks a rule."""
        may_be_0 = "warmup_iters weight_decay beta2 dropout adversarial growth seed subset holdout".split()
        may_be_0 += "easy_share rotation scaling shear translation elastic num_workers".split()
        choices = {"precision": "auto float32 bfloat16", "compile": "auto on off"}
        choices["n_embd"] = str(self.n_head * self.d_head)
        for name, value in asdict(self).items():
            if name in choices and str(value) not in choices[name].split():
                raise ValueError(f"{name} must be {' or '.join(choices[name].split())}, not {value}")
            low, below = -(name == "num_workers"), 1 if name in ("beta2", "dropout", "easy_share") else 2**63
            if type(value) is not str and not (low <= value < below and (value or name in may_be_0)):
                raise ValueError(f"{name} can't be {value}")


# ---------------------------------------------------------------------------- data
def load_mnist(config: Config) -> tuple[Tensor, ...]:
    """Return training images (N, 784) uint8, their labels (N,) int64, and the same for testing."""
    sets = []
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        path = Path(config.data_dir, "MNIST", "raw", f"{name}-ubyte.gz").expanduser()
        with explained(f"can't read {path}; restore the archive or set --data_dir"):  # gzip checks its CRC
            content = torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)
        data = content[16:].view(-1, 784) if "images" in name else content[8:].long()  # behind the header
        sets.append(data[: config.subset or None])
    n = len(sets[0]) - config.holdout  # images to train on
    if n < 1:
        sys.exit(f"{ERROR} holdout {config.holdout} leaves none of the {len(sets[0])} training images")
    return *(x[:n] for x in sets[:2]), *((x[n:] for x in sets[:2]) if config.holdout else sets[2:])


def shuffled_indices(n_images: int, config: Config, start: int) -> Iterator[Tensor]:
    """Yield the indices (batch_size,) of each step after `start`, which depend on seed and step alone."""
    n_pass, skip = divmod(start * config.batch_size, n_images)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(start, config.max_iters):
        while len(order) < config.batch_size:  # each pass takes each image once
            generator = torch.Generator().manual_seed(hash((config.seed, n_pass)))
            order = torch.cat([order, torch.randperm(n_images, generator=generator)[skip:]])
            n_pass, skip = n_pass + 1, 0
        yield order[: config.batch_size]
        order = order[config.batch_size :]


def augment(images: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """Return images (B, 784) uint8, each moved, and bent (elastic deformation: Simard et al. 2003), at random."""

    def uniform(limit: float) -> Tensor:
        return limit * (2 * torch.rand(len(images), generator=generator) - 1)

    angle, shear = torch.deg2rad(uniform(config.rotation)), uniform(config.shear)
    cos, sin, wide, high = angle.cos(), angle.sin(), 1 + uniform(config.scaling), 1 + uniform(config.scaling)
    shift_x, shift_y = uniform(config.translation / 14), uniform(config.translation / 14)  # the image is 2 wide
    x = torch.stack([cos / wide, (sin + shear * cos) / high, shift_x], -1)
    y = torch.stack([-sin / wide, (cos - shear * sin) / high, shift_y], -1)
    theta = torch.stack([x, y], 1)  # (B, 2, 3)
    affine = F.affine_grid(torch.eye(2, 3)[None], (1, 1, 28, 28), align_corners=False).view(784, 2)
    basis = torch.cat([F.pad(affine, (0, 1), value=1.0), ELASTIC_BASIS], -1)  # (784, 3 + 25)
    bending = torch.randn(len(images), 2, 25, generator=generator) * config.elastic / 14  # of 5 x 5 control points
    grid = torch.cat([theta, bending], -1) @ basis.T  # (B, 2, 784): where each pixel comes from
    grid = grid.mT.view(-1, 28, 28, 2)
    moved = F.grid_sample(images.view(-1, 1, 28, 28).float(), grid, "bicubic", align_corners=False)  # bilinear blurs
    return moved.round().clamp(0, 255).to(torch.uint8).flatten(1)


ELASTIC_BASIS = F.interpolate(torch.eye(25).view(1, 25, 5, 5), size=(28, 28), mode="bicubic").view(25, 784).T


class AugmentedBatches(Dataset):
    """Makes this process's share of whole augmented batches, each of which depends on seed and step alone."""

    def __init__(self, images: Tensor, labels: Tensor, config: Config, rank: int, world: int, n_slots: int):
        self.images, self.labels, self.config, self.rank = images, labels, config, rank
        share = n_slots, config.batch_size // world  # all the shared memory that workers use
        self.slots = [torch.empty(*share, 784, dtype=torch.uint8), torch.empty(share, dtype=torch.long)]
        self.slots = [slots.share_memory_() for slots in self.slots]

    def __getitem__(self, key: tuple[int, list[int]]) -> int:
        step, share = key
        generator = torch.Generator().manual_seed(hash((self.config.seed, step, self.rank)))
        parts, slot = self.images[share].split(256), step % len(self.slots[0])  # 256 stay in a core's cache
        self.slots[0][slot] = torch.cat([augment(part, self.config, generator) for part in parts])
        self.slots[1][slot] = self.labels[share]
        return slot


def usable_cores() -> int:
    """Return how many cores this process has to itself: within its affinity, its container and its torchrun."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # of a container; "max" is no number, and means no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def leave_group(worker: int) -> None:
    """Put a worker out of reach of the terminal's Ctrl-C: the training process decides when to stop, and ends it."""
    with suppress(AttributeError):  # not every system has these
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the training process


def next_batch(batches: Iterator) -> int | None:
    """Return the next batch's slot, or None if a signal comes first; after a minute without either, end."""
    for _ in range(60):
        try:
            return next(batches)
        except RuntimeError as error:
            if SIGNALS:
                break
            if "DataLoader timed out" not in str(error):  # it does each second
                raise
    for worker in multiprocessing.active_children():
        worker.kill()  # Python would wait for a stuck one
    if not SIGNALS:
        sys.exit(f"{ERROR} no batch came from the workers in a minute: try --num_workers 0")


def training_batches(images: Tensor, labels: Tensor, config: Config, start: int, device, rank, world) -> Iterator:
    """Yield this process's share, (images, labels) on the device, of the augmented batch of each step after `start`."""
    # Lists, since DataLoader's thread would copy tensors with OpenMP threads of its own: a quarter slower on a CPU.
    shares = (indices[rank::world].tolist() for indices in shuffled_indices(len(images), config, start))
    num_workers = min(16, usable_cores()) if config.num_workers < 0 else config.num_workers
    workers = {"num_workers": num_workers, "worker_init_fn": leave_group, "prefetch_factor": 1, "timeout": 1}
    trouble = r"DataLoader worker \(pid|Connection|Too many open files|shared memory"
    with explained("lower num_workers, or raise ulimit -n or the size of /dev/shm", trouble):
        dataset = AugmentedBatches(images, labels, config, rank, world, num_workers + 1)
        loader = DataLoader(dataset, None, sampler=enumerate(shares, start), **(workers if num_workers else {}))
        batches = iter(loader)
        if num_workers and hasattr(signal, "SIGCHLD"):  # DataLoader would raise an error at any place in the training
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for slot in iter(lambda: next_batch(batches), None):
            batch = (slots[slot] for slots in dataset.slots)
            copies = (x.pin_memory() if device.type == "cuda" else x.clone() for x in batch)  # the slot is used again
            yield tuple(x.to(device, non_blocking=True) for x in copies)


# ---------------------------------------------------------------------------- model
def weighted_sums(t: Tensor, k: Tensor, columns: list[Tensor], over_keys: bool) -> list[Tensor]:
    """Return Σ_j E_ij c_j or, not over keys, Σ_i E_ij c_i of each c, (B, n_head, d_head). E_ij = exp(t_i k_j - max)."""
    t = t * math.log2(math.e)  # exp2 takes less time than exp on a CPU
    largest, smallest = k.amax(-1, keepdim=True), k.amin(-1, keepdim=True)  # subtracted from k: large scores stay exact
    if t.is_cuda:  # torch.compile fuses it all: E never reaches memory
        weights = (t.unsqueeze(-1) * (k.unsqueeze(-2) - torch.where(t > 0, largest, smallest).unsqueeze(-1))).exp2()
        return [((weights if over_keys else weights.mT) * c.unsqueeze(-2)).sum(-1) for c in columns]
    rows = torch.stack([t.clamp(min=0), t.clamp(max=0)], -1)  # (B, n_head, i, 2): t_i in one column, 0 in the other
    keys = torch.stack([k - largest, k - smallest], -2)  # (B, n_head, 2, j)
    columns = torch.stack(columns, -2)
    sums = torch.empty_like(columns)
    n_images = max(1, 700_000 // (t.shape[1] * t.shape[2] ** 2))  # as many as fit their E into a CPU's cache
    with torch.autocast(t.device.type, enabled=False):
        for a, b, c, out in zip(*(x.split(n_images) for x in (rows, keys, columns, sums)), strict=True):
            weights = (a @ b).exp2_()
            out.copy_(c @ (weights.mT if over_keys else weights))  # 4 times as fast on a CPU as weights @ c
    return sums.unbind(-2)


class RankOneAttention(torch.autograd.Function):
    """softmax_j(t_i k_j) v_j with O(d_head) memory per row: scores of width-1 tokens are an outer product.

    With n = Σ_j E_ij, P = E / n, o = Pv and g = do / n: dt = do · (P(v·k) - o · Pk), dv = Eᵀg and dk = v · Eᵀ(g·t) -
    Eᵀ(g·o·t). The backward pass computes E again, as FlashAttention does (Dao et al. 2022, arXiv:2205.14135).
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
    """Return softmax_j(scale q_i k_j) v_j, exact, for q, k, v of shape (B, n_head, d_head)."""
    return RankOneAttention.apply(q * scale, k, v)


class MultiHead(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.n_head, self.scale = config.n_head, config.n_embd**-0.5
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj, self.dropout = nn.Linear(config.n_embd, config.n_embd), nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, n_embd)
        qkv = self.qkv(x).to(x.dtype).unflatten(-1, (3, self.n_head, -1))  # autocast or not, scores are float32
        return self.dropout(self.proj(scalar_attention(*qkv.unbind(1), self.scale).flatten(1)))


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
    def __init__(self, config: Config):
        super().__init__()
        self.embed = nn.Identity() if config.n_embd == 784 else nn.Linear(784, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.depth, self.precision = config.n_layers, config.precision  # blocks in use; type of matrix products
        self.ln, self.head = nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, 10)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # what writes into the residual stream starts smaller, as in GPT-2
                writes = name.endswith(("proj.weight", "ff.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layers) if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 10) of images (B, 784), uint8 or pixels in [0, 1]."""
        x = images / 255 if images.dtype == torch.uint8 else images
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            x = self.embed(x).to(x.dtype)  # under autocast, the residual stream stays float32
            for block in self.blocks[: self.depth]:
                x = block(x)
            return self.head(self.ln(x)).float()


# ---------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 2000) -> tuple[float, Tensor]:
    """Return the mean cross-entropy and the probabilities (N, 10), in eval mode, each of N images counted once."""
    logits = torch.cat([model.eval()(part) for part in images.split(batch_size)])
    model.train()
    return F.cross_entropy(logits, labels).item(), logits.softmax(-1)


def log_evaluation(model: Transformer, images: Tensor, labels: Tensor, state: dict, path: Path) -> Tensor:
    """Evaluate, add a row to the log in `state`, print and write it, and return the probabilities (N, 10)."""
    test_loss, probabilities = evaluate(model, images, labels)
    accuracy = (probabilities.argmax(-1) == labels).float().mean().item()
    steps, seconds = (state[name] - (state["log"][-1][name] if state["log"] else 0) for name in ("iter", "seconds"))
    speed, train_loss = steps * state["config"]["batch_size"] / seconds, state["loss_sum"].item() / steps
    row = {"iter": state["iter"], "learning_rate": state["learning_rate"], "train_loss": train_loss}
    row |= {"test_loss": test_loss, "test_accuracy": accuracy, "images_per_second": speed, "seconds": state["seconds"]}
    state["log"].append(row)
    state["loss_sum"].zero_()
    losses = f"train loss {train_loss:.4f}, test loss {test_loss:.4f}, test accuracy {accuracy:.2%}"
    tqdm.write(f"step {state['iter']}: {losses}, {speed:.0f} images/s, {state['seconds']:.0f} s")
    lines = [",".join(map(str, line)) + "\n" for line in (row, *(row.values() for row in state["log"]))]
    try:
        write(path, "".join(lines))
    except SystemExit as error:  # a spreadsheet may have it open
        tqdm.write(f"{error}; the next evaluation will try again")
    return probabilities


def print_results(probabilities: Tensor, labels: Tensor, config: Config, out: Path) -> None:
    """Print the three likeliest labels of ten random test digits, how to see more, and the accuracy."""
    for i in torch.randperm(len(labels), generator=torch.Generator().manual_seed(config.seed))[:10].tolist():
        likeliest = [f"{digit}: {p:7.2%}" for p, digit in zip(*probabilities[i].topk(3), strict=True)]
        print(f"test digit {i:5d} is a {labels[i]}, the model says", *likeliest, sep="   ")
    print(f"to see what it has learned: python look.py {shlex.quote(str(out))}")
    correct = int((probabilities.argmax(-1) == labels).sum())
    print(f"accuracy: {correct / len(labels):.2%} ({correct} of {len(labels)})")


# ---------------------------------------------------------------------------- training
def set_up(config: Config) -> tuple[torch.device, int, int]:
    """Return the device, this process's rank and the number of processes, joined if torchrun started them."""
    name, rank, world = config.device, 0, 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dist.is_torchelastic_launched():  # if not, RANK and WORLD_SIZE are a cluster's and mean nothing here
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        name = f"cuda:{os.environ['LOCAL_RANK']}" if name.startswith("cuda") else name
        dist.init_process_group("cpu:gloo,cuda:nccl" if name.startswith("cuda") else "gloo")
        sys.stdout = sys.stdout if rank == 0 else None  # print is silent then
    with explained(f"device {name} can't be used"):
        device = torch.tensor(torch.zeros(1, device=name).item(), device=name).device
    if config.batch_size % world:
        sys.exit(f"{ERROR} batch_size {config.batch_size} can't be split evenly over {world} processes")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX, then M_TRIM_THRESHOLD: glibc keeps freed memory for the next
        ctypes.CDLL(None).mallopt(-1, -1)  # step, since getting it anew from the system costs page faults
    return device, rank, world


def schedule(step: int, config: Config) -> tuple[float, int]:
    """Return a step's learning rate (linear warmup, then cosine decay to 0 at max_iters) and its blocks in use."""
    rate = config.learning_rate * (step + 1) / max(1, config.warmup_iters)
    if step >= config.warmup_iters:
        progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    blocks = math.ceil(config.n_layers * (step / config.max_iters) ** config.growth)
    return rate, min(max(config.first_layers, blocks), config.n_layers)


class Trainer:  # the model, its optimizer, and the step that trains it
    def __init__(self, config: Config, device: torch.device, world: int, state: dict):
        torch.manual_seed(config.seed)
        self.config, self.model, cuda = config, Transformer(config).to(device), device.type == "cuda"
        cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        if config.precision == "auto":  # where the hardware is made for bfloat16: old GPUs only emulate it
            native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else cpu.get("avx512_bf16")
            self.model.precision = "bfloat16" if native else "float32"
        onednn_beats_mkl = self.model.precision == "float32" and cpu.get("avx512_bf16") and not cpu.get("amx_tile")
        torch.set_float32_matmul_precision("high" if cuda else "medium" if onednn_beats_mkl else "highest")
        matrices, others = ([p for p in self.model.parameters() if (p.dim() > 1) == is_so] for is_so in (True, False))
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        rate = torch.zeros((), device=device)  # in a tensor, which a CUDA graph reads at each replay
        self.optimizer = torch.optim.AdamW(groups, rate, (0.9, config.beta2), fused=True, capturable=cuda)
        if "model" in state:
            with explained(f"the saved weights don't fit the Transformer in {SCRIPT}.py: was it changed since?"):
                self.model.load_state_dict(state.pop("model"))
                self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state.pop("optimizer")})
        if config.compile == "on" or (config.compile == "auto" and cuda):
            try:
                torch.compile(torch.sin)(torch.zeros(1, device=device))
                for block in self.model.blocks:  # one by one: they share their code, so the compiler works once
                    block.compile(dynamic=False)
            except Exception as error:
                print(f"going on without torch.compile, which can't work here: {str(error).splitlines()[0]}")
        self.world, self.parallel = world, self.model
        self.recorded, self.depth = cuda and world == 1, 0

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.config.easy_share:  # most images soon teach nothing more (ordered SGD: Kawaguchi and Lu 2020)
            with torch.no_grad():  # looking at one takes a third of the time of training on it
                losses = F.cross_entropy(self.model(images), labels, reduction="none")
            hard = losses.topk(len(losses) - int(self.config.easy_share * len(losses))).indices
            images, labels = images[hard], labels[hard]
        if self.config.adversarial:  # the fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572)
            pixels = (images / 255).requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(self.model(pixels), labels), pixels)
            images = (pixels + self.config.adversarial * gradient.sign()).detach()
        loss = F.cross_entropy(self.parallel(images), labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach() + 0 * norm

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.depth != self.model.depth:
            self.depth, self.calls, self.graph = self.model.depth, 0, None
            if self.world > 1:  # blocks that are not in use yet get no gradient: DDP must not wait for one
                unused = self.depth < len(self.model.blocks)
                self.parallel = nn.parallel.DistributedDataParallel(self.model, find_unused_parameters=unused)
        self.calls += 1
        if self.calls <= 3 or not self.recorded:  # three usual steps compile, and make AdamW's averages
            return self.step(images, labels)
        if not self.graph:
            self.batch, self.graph = (images.clone(), labels.clone()), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may pin memory
                self.loss = self.step(*self.batch)
        self.batch[0].copy_(images)
        self.batch[1].copy_(labels)
        self.graph.replay()
        return self.loss


def train(config: Config, state: dict) -> int:
    """Train from `state` on, a saved run's or {} for a new one, and print the results; return the exit status."""
    device, rank, world = set_up(config)
    train_images, train_labels, *test_set = load_mnist(config)
    trainer, out = Trainer(config, device, world, state), Path(config.out_dir) if state else None
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"device: {device} ({kind}), {trainer.model.precision}" + f", {world} processes" * (world > 1))
    print(f"parameters: {sum(p.numel() for p in trainer.model.parameters()):,}")
    state = {"script": SCRIPT, "iter": 0, "depth": 1, "log": [], "seconds": 0.0, "loss_sum": torch.zeros(())} | state
    state |= {"config": asdict(config), "model": trainer.model.state_dict(), "loss_sum": state["loss_sum"].to(device)}
    batches = training_batches(train_images, train_labels, config, state["iter"], device, rank, world)
    last_save, began = time.perf_counter(), time.perf_counter() - state["seconds"]
    with tqdm(batches, initial=state["iter"], total=config.max_iters, disable=None if rank == 0 else True) as bar:
        for step, (images, labels) in enumerate(bar, state["iter"] + 1):
            torch.manual_seed(hash((config.seed, step, rank)))  # dropout depends on the step alone: resuming is exact
            rate, blocks = schedule(step, config)
            trainer.optimizer.param_groups[0]["lr"].fill_(rate)  # the groups share it
            trainer.model.depth = max(state["depth"], blocks)  # a run made longer keeps the blocks it has
            loss, stopped = trainer(images, labels), torch.tensor(max(SIGNALS, default=0))
            if world > 1:
                dist.all_reduce(loss.div_(world))
                dist.all_reduce(stopped, dist.ReduceOp.MAX)  # on the CPU: reading it doesn't wait for the GPU
            state["loss_sum"] += loss
            state |= {"iter": step, "learning_rate": rate, "depth": trainer.model.depth}
            if rank == 0 and not out:  # only now: a start that fails leaves nothing behind
                out = new_folder(config)
            evaluating = step % config.eval_interval == 0 or step == config.max_iters
            if step % 10 and not evaluating and not stopped:
                continue  # looking at the loss makes the CPU wait for the GPU
            if not state["loss_sum"].isfinite():
                sys.exit(f"{ERROR} the loss is not finite at step {step}: lower learning_rate; no checkpoint is harmed")
            state["seconds"] = time.perf_counter() - began
            bar.set_postfix_str(f"step {step}, loss {loss:.4f}", refresh=False)
            if evaluating and rank == 0:
                probabilities = log_evaluation(trainer.model, *(x.to(device) for x in test_set), state, out / "log.csv")
            if rank == 0 and time.perf_counter() - last_save > SAVE_SECONDS:
                write(out / "checkpoint.pt", state | {"optimizer": trainer.optimizer.state_dict()["state"]})
                last_save = time.perf_counter()
            if stopped:
                break
    if rank == 0 and state["iter"] == config.max_iters:
        write(out / "model.pt", state)
        (out / "checkpoint.pt").unlink(missing_ok=True)
        print_results(probabilities.cpu(), test_set[1], config, out)
    elif rank == 0:
        write(out / "checkpoint.pt", state | {"optimizer": trainer.optimizer.state_dict()["state"]})
        launch = f"torchrun --standalone --nproc_per_node={world}" if world > 1 else "python"
        print(f"stopped; to go on: {launch} {shlex.quote(sys.argv[0])} --resume --out_dir {shlex.quote(str(out))}")
    if dist.is_initialized():
        dist.barrier()  # gives Gloo's threads time: one that frees a tensor while Python ends would crash (NOTES.md)
        dist.destroy_process_group()
    return 0 if state["iter"] == config.max_iters else 128 + max(SIGNALS, default=signal.SIGTERM)


# ---------------------------------------------------------------------------- files
@contextmanager
def explained(message: str, pattern: str = "") -> Iterator[None]:
    """Turn an error whose text matches the pattern into one line: the message, and what the error says."""
    try:
        yield
    except Exception as error:
        if not re.search(pattern, repr(error)):
            raise
        sys.exit(f"{ERROR} {message} ({str(error).partition(chr(10))[0] or type(error).__name__})")


def write(path: Path, content: dict | str) -> None:
    """Write a state or a text so that neither a reader nor a crash ever meets half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with explained(f"can't write {path}"):
        try:
            temporary.write_text(content, newline="\n") if isinstance(content, str) else torch.save(content, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def new_folder(config: Config) -> Path:
    """Make and return a new run's folder: out_dir or, where that default holds a run, the next free -2, -3, ..."""
    for suffix in ["", *(f"-{n}" for n in range(2, 10_000))]:
        out = Path(config.out_dir + suffix).expanduser()
        with explained(f"can't write into {out}"):
            out.mkdir(parents=True, exist_ok=True)
            if not (out / "log.csv").exists():
                (out / "log.csv").touch(exist_ok=False)  # of two runs that start at once, one gets the folder
                return out
        if config.out_dir != Config.out_dir:
            sys.exit(f"{ERROR} {out} holds a run: continue it with --resume, or choose another --out_dir")
        print(f"{out} holds a run; trying the next")


def saved_run(given: dict) -> tuple[Config, dict]:
    """Return config and state of the checkpoint in out_dir or, if none is given, of the run that was stopped last."""
    out = Path(given.get("out_dir", Config.out_dir)).expanduser()
    folders = [out] if "out_dir" in given else [out, *out.parent.glob(f"{out.name}-*")]
    path = max((f / "checkpoint.pt" for f in folders), key=lambda path: path.exists() and path.stat().st_mtime)
    with explained(f"{path} is missing, damaged, or not from this version of {SCRIPT}.py"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**state["config"] | given | {"out_dir": str(path.parent)})
        if state["script"] != SCRIPT:
            raise ValueError(f"it is from {state['script']}.py")
    for name in given.keys() - "max_iters eval_interval device precision compile data_dir out_dir num_workers".split():
        if given[name] != state["config"][name]:
            sys.exit(f"{ERROR} --{name} can't change on --resume: {path} has {state['config'][name]}")
    if state["iter"] >= config.max_iters:
        sys.exit(f"{ERROR} {path} has {state['iter']} steps already: raise --max_iters")
    return config, state


# ---------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one stops training after the step, the second at once
        signal.signal(number, lambda number, _: (SIGNALS.append(number), signal.signal(number, signal.SIG_DFL)))
    sys.stdout.reconfigure(line_buffering=True)  # each line is seen when it is printed, also in a file
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", Path(__file__).read_text("utf-8"), re.MULTILINE))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--resume", action="store_true", help="continue the run in out_dir, or the one stopped last")
    for f in fields(Config):
        text = f"{comments[f.name]} (default: {f.default})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=f.type, default=argparse.SUPPRESS, help=text, metavar=f.type.__name__)
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    try:
        config = Config(**given)
    except ValueError as error:
        parser.error(str(error))
    with explained("out of memory: lower batch_size", "MemoryError|(allocate|out of) memory"):
        return train(*saved_run(given) if resume else (config, {}))


if __name__ == "__main__":
    sys.exit(main())
