"""The full Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), trained on MNIST.

    python vit.py             # train; flags and torchrun as in mini_vit.py
    diff mini_vit.py vit.py   # what makes a ViT a ViT

An image is cut into patches, which are its tokens, and attention works among them. Each step looks
at 512 images and trains on the 128 with the highest loss. 803,338 parameters reach 99.53 ± 0.06 %
on the test set (mean and standard deviation of ten seeds), in about 5 minutes on two cores of an
Intel Xeon with AMX (bfloat16, torch 2.15.0). With ViT-B/16's settings the model has 86,567,656
parameters and, given torchvision's weights, computes torchvision's logits.
"""

import argparse
import csv
import ctypes
import functools
import gzip
import itertools
import math
import os
import re
import shlex
import sys
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NoReturn, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm.auto import tqdm

FILE = Path(globals().get("__file__", "vit.py"))  # a notebook's cell has no file
SCRIPT = FILE.stem
SOURCE = FILE.read_text("utf-8") if FILE.exists() else ""  # model.pt says what made it
SAVE_SECONDS = 60  # between two checkpoints; more where saving takes more than a second


# ---------------------------------------------------------------- hyperparameters
# Each field of Config is also a flag, with its comment as the help text. Fields that you add become
# flags, too, if they are an int, float, bool, str or a Literal of strings.
@dataclass
class Config:
    batch_size: int = 512  # images per optimizer step; lower it if memory runs out
    max_iters: int = 4300  # optimizer steps; 60000 / batch_size of them are one pass
    eval_interval: int = 500  # optimizer steps between two evaluations
    learning_rate: float = 2e-3  # AdamW's, at its peak
    warmup_iters: int = 200  # optimizer steps until the peak; then a cosine falls to 0 at max_iters
    weight_decay: float = 0.05  # AdamW's, on matrices only
    beta2: float = 0.98  # AdamW's second beta; below the usual 0.999 because runs are short
    grad_clip: float = 1.0  # largest norm of the gradient
    dropout: float = 0.0  # of the embedding, after attention and after feed-forward
    adversarial: float = 0.0  # pixels (black 0, white 1) move this far to raise the loss; 0: off
    easy_share: float = 0.75  # share of each batch to leave out: the images with the lowest loss
    rotation: float = 12.0  # augmentation: largest angle, in degrees, either way
    scaling: float = 0.15  # augmentation: largest change of width and of height, as a share
    shear: float = 0.2  # augmentation: largest slant, horizontal pixels per vertical pixel
    translation: float = 2.0  # augmentation: largest shift along each axis, in pixels
    elastic: float = 0.6  # augmentation: standard deviation of a control point's shift, in pixels
    image_size: int = 28  # pixels along each side of an image; MNIST's have 28
    patch_size: int = 7  # pixels along each side of a patch, which is one token
    channels: int = 1  # colors of an image; MNIST's have 1
    classes: int = 10  # labels to choose from; each has a logit
    n_head: int = 4  # attention heads; must divide n_embd
    n_embd: int = 128  # features of one token
    n_layers: int = 4  # blocks
    first_layers: int = 1  # blocks in use at first, unless growth is 0
    growth: float = 0.0  # later, n_layers * (step / max_iters) ** growth blocks; 0: always all
    attention: Literal["fast", "by the book"] = "fast"  # on CUDA: torch's own kernel, or a formula
    seed: int = 1  # random seed of weights, order of images, augmentation and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps; auto is CUDA, else MPS, else the CPU
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 if hardware has it
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto is on for CUDA
    data_dir: str = str(FILE.absolute().with_name("data"))  # holds MNIST/raw/*.gz
    out_dir: str = f"runs/{SCRIPT}"  # the run's folder; if it holds another run, -2, -3, ...
    subset: int = 0  # use only the first N images of each set; 0 is all
    holdout: int = 0  # hold out the last N training images, and test on those

    def __post_init__(self):
        """Raise ValueError, in one line, for a value that can't be used."""
        at_least_1 = "batch_size max_iters eval_interval n_head n_embd n_layers first_layers"
        at_least_1 += " image_size patch_size channels classes"
        at_least_0 = "warmup_iters weight_decay adversarial growth seed subset holdout"
        at_least_0 += " rotation shear translation elastic"
        for least, names in ((1, at_least_1), (0, at_least_0)):
            for name in names.split():
                if not least <= getattr(self, name) < 2**63:
                    raise ValueError(f"{name} must be {least} or more, not {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        for name in ("beta2", "dropout", "easy_share", "scaling"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.image_size % self.patch_size:
            sizes = f"patch_size {self.patch_size} must divide image_size {self.image_size}"
            raise ValueError(sizes)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head {self.n_head} must divide n_embd {self.n_embd}")


# ---------------------------------------------------------------- data
def load_mnist(config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images (N, 784) uint8, their labels (N,) int64, and the same for testing."""
    images, labels = read_set("train", config)
    test_images, test_labels = read_set("t10k", config)
    if config.holdout >= len(images):
        fail(f"holdout {config.holdout} leaves none of the {len(images)} training images")
    if config.holdout:
        test_images = images[-config.holdout :]
        test_labels = labels[-config.holdout :]
        images = images[: -config.holdout]
        labels = labels[: -config.holdout]
    n = config.subset or None  # [:None] is all
    return images[:n], labels[:n], test_images[:n], test_labels[:n]


def read_set(name: str, config: Config) -> tuple[Tensor, Tensor]:
    """Return images (N, 784) uint8 and labels (N,) int64 of MNIST's set "train" or "t10k"."""
    # Images follow a header of 16 bytes, labels one of 8.
    images = read_archive(f"{name}-images-idx3-ubyte.gz", config)[16:]
    labels = read_archive(f"{name}-labels-idx1-ubyte.gz", config)[8:].long()
    if len(images) != 784 * len(labels) or len(labels) == 0:
        fail(f"{config.data_dir}: the archives of {name} don't hold 784 pixels for each label")
    if (config.channels, config.image_size) != (1, 28):
        fail("MNIST's images have channels 1 and image_size 28")
    if labels.max() >= config.classes:
        fail(f"{config.data_dir}: there is a label {labels.max()}: raise classes")
    return images.view(-1, 784), labels


def read_archive(name: str, config: Config) -> Tensor:
    """Return the bytes of one of MNIST's four archives, uint8; gzip checks their CRC."""
    path = Path(os.path.expanduser(config.data_dir), "MNIST", "raw", name)
    try:
        content = bytearray(gzip.decompress(path.read_bytes()))
        return torch.frombuffer(content, dtype=torch.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        fail(f"can't read {path}; restore the archive or set --data_dir", error)


def batch_indices(step: int, n_images: int, config: Config) -> Tensor:
    """Return the indices (batch_size,) of a step's images; steps count from 1.

    They don't depend on earlier steps, so a resumed run sees the same images as an unbroken one.
    Each pass takes each image once; a batch may end one pass and begin the next.
    """
    before = (step - 1) * config.batch_size  # images taken in earlier steps, over all passes
    last = before + config.batch_size - 1
    passes = range(before // n_images, last // n_images + 1)  # those that the batch takes from
    order = torch.cat([shuffled(n_images, n_pass, config.seed) for n_pass in passes])
    offset = before % n_images
    return order[offset : offset + config.batch_size]


@functools.lru_cache(maxsize=2)  # many steps share a pass
def shuffled(n_images: int, n_pass: int, seed: int) -> Tensor:
    """Return the order (n_images,) in which a pass takes the images; n_pass counts from 0."""
    # hash mixes both numbers into one seed, the same one in every process.
    generator = torch.Generator().manual_seed(hash((seed, n_pass)))
    return torch.randperm(n_images, generator=generator)


def augment(images: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """Return images (B, 784) uint8, each distorted at random.

    Each is rotated, sheared, scaled, shifted and bent. The bending is an elastic deformation
    (Simard et al. 2003) with 5 x 5 control points. The images may be on any device. The generator
    is the CPU's, so that a run draws the same numbers on every device.
    """
    n_images = len(images)

    def uniform(limit: float) -> Tensor:
        return limit * (2 * torch.rand(n_images, generator=generator) - 1)

    angle = torch.deg2rad(uniform(config.rotation))
    shear = uniform(config.shear)
    wide = 1 + uniform(config.scaling)
    high = 1 + uniform(config.scaling)
    shift_x = uniform(config.translation / 14)  # in grid_sample's units, an image is 2 wide
    shift_y = uniform(config.translation / 14)
    # grid_sample asks where each pixel of the new image comes from. The answer is an affine map:
    # rotation @ slant @ diag(1 / wide, 1 / high), and a shift.
    cos = angle.cos()
    sin = angle.sin()
    x = torch.stack([cos / wide, (sin + shear * cos) / high, shift_x], -1)
    y = torch.stack([-sin / wide, (cos - shear * sin) / high, shift_y], -1)
    affine = torch.stack([x, y], 1)  # (B, 2, 3)
    bending = torch.randn(n_images, 2, 25, generator=generator) * config.elastic / 14
    warp = torch.cat([affine, bending], -1).to(images.device)  # (B, 2, 3 + 25)
    grid = warp @ warp_basis(images.device).T  # (B, 2, 784): where each pixel is from
    grid = grid.mT.view(-1, 28, 28, 2)
    pixels = images.view(-1, 1, 28, 28).float()
    moved = F.grid_sample(pixels, grid, "bicubic", align_corners=False)  # bilinear would blur
    return moved.round().clamp(0, 255).to(torch.uint8).flatten(1)


@functools.cache
def warp_basis(device: torch.device) -> Tensor:
    """Return the matrix (784, 28) that maps a warp's 3 + 25 numbers to where each pixel is from.

    The first three columns, x, y and 1, make the affine map; the other 25 say how far each control
    point moves the pixel. (That the sum is also an image's width is a coincidence.)
    """
    identity = torch.eye(2, 3)[None]
    places = F.affine_grid(identity, (1, 1, 28, 28), align_corners=False).view(784, 2)
    points = torch.eye(25).view(1, 25, 5, 5)
    bending = F.interpolate(points, size=(28, 28), mode="bicubic").view(25, 784).T
    return torch.cat([F.pad(places, (0, 1), value=1.0), bending], -1).to(device)


def training_batches(
    images: Tensor, labels: Tensor, config: Config, start: int, device, rank=0, world=1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's share (images, labels) of each augmented batch after step `start`."""
    images = images.to(device)  # 47 MB: the whole set lives on the device
    labels = labels.to(device)
    for step in range(start + 1, config.max_iters + 1):
        indices = batch_indices(step, len(images), config)
        share = indices[rank::world].to(device)
        generator = torch.Generator().manual_seed(hash((config.seed, step - 1, rank)))
        yield augment(images[share], config, generator), labels[share]


# ---------------------------------------------------------------- model
class Transformer(nn.Module):
    """Classifies images, each a sequence of tokens: a class token, then its patches."""

    def __init__(self, config: Config):
        super().__init__()
        self.image_shape = (config.channels, config.image_size, config.image_size)
        self.patch_size = config.patch_size
        n_patches = (config.image_size // config.patch_size) ** 2
        self.embed = nn.Linear(config.channels * config.patch_size**2, config.n_embd)
        self.class_token = nn.Parameter(torch.zeros(config.n_embd))
        self.position = nn.Parameter(torch.zeros(1 + n_patches, config.n_embd))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln = nn.LayerNorm(config.n_embd, eps=1e-6)  # torchvision's eps
        self.head = nn.Linear(config.n_embd, config.classes)
        self.depth = config.n_layers  # blocks in use; Trainer changes it
        self.precision = config.precision  # of matrix products; Trainer replaces "auto"
        self.initialize(config)

    def initialize(self, config: Config) -> None:
        """Initialize matrices and positions at random, biases and the class token as 0.

        Layers that write to the residual stream start smaller, as in GPT-2.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = parameter.shape[1] ** -0.5  # for narrow layers, GPT-2's 0.02 is too little
                if name.endswith(("proj.weight", "ff.2.weight")):  # a block's outputs
                    std = std / math.sqrt(2 * config.n_layers)
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images: uint8, or floats for which white is 1.

        Images have shape (B, channels * image_size²), or any other shape with that many numbers.
        """
        x = images / 255 if images.dtype == torch.uint8 else images
        x = x.reshape(-1, *self.image_shape)
        x = F.unfold(x, self.patch_size, stride=self.patch_size).mT  # (B, patches, pixels)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            x = self.embed(x).float()  # (B, patches, n_embd); the residual stream stays float32
            class_token = self.class_token.expand(len(x), 1, -1)
            x = torch.cat([class_token, x], 1) + self.position  # (B, 1 + patches, n_embd)
            x = self.dropout(x)
            for block in self.blocks[: self.depth]:
                x = block(x)
            logits = self.head(self.ln(x[:, 0]))  # of the class token
        return logits.float()


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: Config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd, eps=1e-6)
        self.attn = MultiHead(config)
        self.ln2 = nn.LayerNorm(config.n_embd, eps=1e-6)
        self.ff = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:  # (B, tokens, n_embd)
        x = x + self.attn(self.ln1(x))
        x = x + self.ff(self.ln2(x))
        return x


class FeedForward(nn.Sequential):
    """Two linear layers, four times as wide in between."""

    def __init__(self, config: Config):
        super().__init__(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(),
            nn.Linear(4 * config.n_embd, config.n_embd),
            nn.Dropout(config.dropout),
        )


class MultiHead(nn.Module):
    """Multi-head self-attention over the tokens."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head = config.n_head
        self.fast = config.attention == "fast"
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, tokens, n_embd)
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1))  # (B, tokens, 3, n_head, d_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, tokens, d_head)
        if self.fast and x.is_cuda:
            out = F.scaled_dot_product_attention(q, k, v)
        else:  # the same, written out, which is faster in bfloat16 on a CPU
            weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # (B, n_head, tokens, tokens)
            out = weights @ v
        out = out.transpose(1, 2).flatten(2)  # (B, tokens, n_embd)
        return self.dropout(self.proj(out))


# ---------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 2000
) -> tuple[float, Tensor]:
    """Return the mean cross-entropy over all N images and the probabilities (N, 10).

    The model is switched to eval mode, and back at the end.
    """
    was_training = model.training
    model.eval()
    logits = torch.cat([model(part) for part in images.split(batch_size)])
    model.train(was_training)
    return F.cross_entropy(logits, labels).item(), logits.softmax(-1)


# ---------------------------------------------------------------- training
def learning_rate(step: int, config: Config) -> float:
    """Return the learning rate of a step, counted from 1: linear warmup, then cosine decay.

    Warmup begins at 2 / warmup_iters of the peak and gets there a step early. That hardly matters,
    but is kept so that results can be repeated. If steps remain for the decay, it ends at 0.
    """
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    decay_iters = max(1, config.max_iters - config.warmup_iters)
    progress = (step - config.warmup_iters) / decay_iters
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def blocks_in_use(step: int, config: Config) -> int:
    """Return how many blocks a step uses: all if growth is 0, else few for most of a run.

    A shallow network learns faster and costs less. The larger growth is, the later the others join:
    with growth 32 and first_layers 2, the third of 16 blocks joins after 94 % of the run. Blocks
    that join so late change little: mini_vit.py is as accurate with n_layers 2 (RESULTS.md), and
    has 16 only because the original has.
    """
    blocks = math.ceil(config.n_layers * (step / config.max_iters) ** config.growth)
    return min(max(config.first_layers, blocks), config.n_layers)


@torch.no_grad()
def hardest(
    model: nn.Module, images: Tensor, labels: Tensor, easy_share: float
) -> tuple[Tensor, Tensor]:
    """Return the images and labels, leaving out the share `easy_share` with the lowest loss.

    Most images soon have little left to teach (ordered SGD: Kawaguchi and Lu 2020). Finding
    them costs a forward pass, a third of the time of training on them; the rest is saved.
    """
    losses = F.cross_entropy(model(images), labels, reduction="none")
    n_hard = len(losses) - int(easy_share * len(losses))
    hard = losses.topk(n_hard).indices
    return images[hard], labels[hard]


def adversarial_images(model: nn.Module, images: Tensor, labels: Tensor, distance: float) -> Tensor:
    """Return images (B, 784), each pixel moved by `distance` in the direction that raises the loss.

    Black is 0 and white 1; pixels may leave that range. This is the fast gradient sign method
    (Goodfellow et al. 2015, arXiv:1412.6572). It takes a second pass, about two thirds as long as
    the training pass, and keeps a network from memorizing its images. Dropout is on, but drops
    other features than in the training pass.
    """
    pixels = (images / 255).requires_grad_()
    loss = F.cross_entropy(model(pixels), labels)
    (gradient,) = torch.autograd.grad(loss, pixels)
    return (pixels + distance * gradient.sign()).detach()


class Trainer:
    """A model, its optimizer and its progress; state_dict() returns what a checkpoint holds."""

    def __init__(self, config: Config, device: torch.device, world: int = 1):
        self.config = config
        self.device = device
        self.world = world  # processes that train together
        torch.manual_seed(config.seed)
        self.model = Transformer(config).to(device)
        self.model.precision = choose_precision(config, device)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=torch.zeros((), device=device),  # a tensor, so that a CUDA graph can read it
            betas=(0.9, config.beta2),
            fused=True,
            capturable=device.type == "cuda",
        )
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # of training, evaluations and saves included
        self.loss_sum = torch.zeros((), device=device)  # over the steps since the last evaluation
        self.log = []  # one dictionary per evaluation
        self.set_depth(blocks_in_use(1, config))

    def set_schedules(self, step: int) -> None:
        """Set the learning rate and the number of blocks for a step."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(learning_rate(step, self.config))
        depth = blocks_in_use(step, self.config)
        if depth > self.model.depth:  # never fewer: max_iters may have been raised on --resume
            self.set_depth(depth)

    def set_depth(self, depth: int) -> None:
        """Use the first `depth` blocks from now on; AdamW skips the others, without gradients."""
        self.model.depth = depth
        # DDP and CUDA graphs are made for one depth. A single process on a CPU uses neither.
        self.parallel = in_parallel(self.model, self.world)  # the model, in DDP if world > 1
        self.train_on = self.update
        if self.device.type == "cuda" and self.world == 1:
            self.train_on = RecordedUpdate(self.update)  # the same, faster

    def update(self, images: Tensor, labels: Tensor) -> Tensor:
        """Do one optimizer step on images (B, 784) uint8 and labels (B,); return the loss.

        A gradient that is not finite ruins the weights; the loss returned is then nan, so that
        train() ends the run without saving. This method itself must not print or read values: a GPU
        records it once and then replays what was recorded (RecordedUpdate).
        """
        # The loss is that of hard or adversarial images, so it is above an evaluation's.
        if self.config.easy_share:
            images, labels = hardest(self.model, images, labels, self.config.easy_share)
        if self.config.adversarial:
            images = adversarial_images(self.model, images, labels, self.config.adversarial)
        loss = F.cross_entropy(self.parallel(images), labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach().where(norm.isfinite(), math.nan)

    def state_dict(self) -> dict:
        """Return what checkpoint.pt holds: all that going on needs."""
        settings = asdict(self.config)
        if self.config.data_dir == Config.data_dir:  # beside the script, wherever that is moved
            del settings["data_dir"]
        return {
            "script": SCRIPT,
            "source": SOURCE,
            "config": settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "iter": self.step,
            "depth": self.model.depth,
            "seconds": self.seconds,
            "loss_sum": self.loss_sum,
            "log": self.log,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what state_dict() returned; the largest parts are taken out of it."""
        self.model.load_state_dict(state.pop("model"))
        optimizer_state = self.optimizer.state_dict()  # settings, such as betas, come from config
        optimizer_state["state"] = state.pop("optimizer")
        self.optimizer.load_state_dict(optimizer_state)
        self.step = state["iter"]
        self.seconds = state["seconds"]
        self.loss_sum = state["loss_sum"].to(self.device)
        self.log = state["log"]
        self.set_depth(state["depth"])


def is_evaluated(step: int, config: Config) -> bool:
    """Return whether an evaluation follows a step; the first one comes early, to show progress."""
    return step in (20, config.max_iters) or step % config.eval_interval == 0


def train(config: Config, checkpoint: dict | None = None, resume: bool = False) -> None:
    """Train and print the results; go on from the checkpoint, if there is one.

    Checkpoints are written on the way, and a run that is stopped in any way goes on from the last
    one (--resume). A new run gets its folder after its first step, because a start that fails
    should leave no trace.
    """
    device, rank, world = set_up(config)
    train_images, train_labels, test_images, test_labels = load_mnist(config)
    test_images = test_images.to(device)
    test_labels = test_labels.to(device)
    trainer = Trainer(config, device, world)
    if checkpoint:
        try:
            trainer.load_state_dict(checkpoint)
        except (KeyError, RuntimeError, ValueError) as error:
            fail(f"{config.out_dir} doesn't fit the Transformer in {FILE.name}", error)
    compile_blocks(trainer.model, config, device)
    say_what_trains(trainer)
    batches = training_batches(
        train_images, train_labels, config, trainer.step, device, rank, world
    )
    last_time = time.perf_counter()
    last_save = time.perf_counter()
    save_interval = SAVE_SECONDS
    no_bar = True if rank > 0 else None  # None: a bar on terminals only
    with tqdm(batches, initial=trainer.step, total=config.max_iters, disable=no_bar) as bar:
        for step, (images, labels) in enumerate(bar, trainer.step + 1):
            # Dropout depends on seed, step and process alone, so resuming is exact, even where a
            # CUDA graph is replayed: it reads the seed each time.
            torch.manual_seed(hash((config.seed, step, rank)))
            trainer.set_schedules(step)

            # One optimizer step.
            loss = trainer.train_on(images, labels)
            trainer.loss_sum += loss
            trainer.step = step
            if step == 1 and rank == 0:
                claim_folder(config, resume)

            # Most steps end here, because reading the loss makes the CPU wait for the GPU. Every
            # tenth is often enough to see that it is finite, and to save.
            evaluating = is_evaluated(step, config)
            if step % 10 != 0 and not evaluating:
                continue
            if world > 1:  # the part that was averaged before is the same everywhere, so it stays
                dist.all_reduce(trainer.loss_sum.div_(world))
            if not trainer.loss_sum.isfinite():
                fail(f"the loss is not finite at step {step}: lower learning_rate")
            now = time.perf_counter()
            trainer.seconds += now - last_time
            last_time = now
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

            if evaluating:
                if rank == 0:
                    probabilities = log_evaluation(trainer, test_images, test_labels)
                    write_log(trainer.log, Path(config.out_dir))
                trainer.loss_sum.zero_()

            # Save once a minute, or less often if that would take more than 2 % of the time.
            due = now - last_save > save_interval and step < config.max_iters
            if due and rank == 0:
                began = time.perf_counter()
                save(trainer, "checkpoint.pt")
                last_save = time.perf_counter()
                save_interval = max(SAVE_SECONDS, 50 * (last_save - began))
    if rank == 0:
        save(trainer, "model.pt")
        print_results(probabilities.cpu(), test_labels.cpu(), config)
    if world > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------- results
def say(text: str) -> None:
    """Print a line, above the progress bar; of several processes, only the first prints."""
    if rank_and_world()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()


def log_evaluation(trainer: Trainer, images: Tensor, labels: Tensor) -> Tensor:
    """Evaluate, print the result, add it to the trainer's log; return the probabilities (N, 10)."""
    # Where a batch fits into memory for training, 16 times as many images do for evaluation.
    n_images = min(2000, 16 * trainer.config.batch_size)
    test_loss, probabilities = evaluate(trainer.model, images, labels, n_images)
    accuracy = (probabilities.argmax(-1) == labels).float().mean().item()
    last = trainer.log[-1] if trainer.log else {"iter": 0, "seconds": 0.0}
    steps = trainer.step - last["iter"]
    seconds = trainer.seconds - last["seconds"]
    row = {
        "iter": trainer.step,
        "learning_rate": learning_rate(trainer.step, trainer.config),
        "train_loss": trainer.loss_sum.item() / steps,
        "test_loss": test_loss,
        "test_accuracy": accuracy,
        "images_per_second": steps * trainer.config.batch_size / max(seconds, 1e-9),
        "seconds": trainer.seconds,
    }
    trainer.log.append(row)
    test = "held-out" if trainer.config.holdout else "test"
    losses = f"train loss {row['train_loss']:.4f}, {test} loss {test_loss:.4f}"
    speed = f"{row['images_per_second']:.0f} images/s, {trainer.seconds:.0f} s"
    say(f"step {trainer.step}: {losses}, {test} accuracy {accuracy:.2%}, {speed}")
    return probabilities


def print_results(probabilities: Tensor, labels: Tensor, config: Config) -> None:
    """Print the three likeliest labels of ten random test digits, and the accuracy."""
    test = "held-out" if config.holdout else "test"
    generator = torch.Generator().manual_seed(config.seed)
    for i in torch.randperm(len(labels), generator=generator)[:10].tolist():
        line = f"{test} digit {i:5d} is a {labels[i]}, the model says"
        for p, digit in zip(*probabilities[i].topk(3), strict=True):
            line += f"   {digit}: {p:7.2%}"
        say(line)
    say(f"to see what it has learned: python look.py {shlex.quote(config.out_dir)}")
    correct = int((probabilities.argmax(-1) == labels).sum())
    kind = "held-out accuracy" if config.holdout else "accuracy"
    say(f"{kind}: {correct / len(labels):.2%} ({correct} of {len(labels)})")


# ---------------------------------------------------------------- hardware
def set_up(config: Config) -> tuple[torch.device, int, int]:
    """Return the device, this process's rank and the number of processes that train together."""
    rank, world = rank_and_world()
    device = choose_device(config.device)
    if config.batch_size % world:
        fail(f"batch_size {config.batch_size} can't be split evenly over {world} processes")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    elif sys.platform == "linux":
        keep_freed_memory()
    if world > 1:
        store, _, _ = next(dist.rendezvous("env://"))
        # torchrun's store outlives processes that have died: new ones would find their addresses
        # there, and wait for them. So each start has keys of its own.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return device, rank, world


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes that train together."""
    if not dist.is_torchelastic_launched():  # a cluster may set RANK for purposes of its own
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def choose_device(name: str) -> torch.device:
    """Return the device of this name; auto is CUDA, else MPS, else the CPU."""
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and dist.is_torchelastic_launched():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # a "meta" tensor has no value
    except Exception as error:  # torch raises many kinds
        fail(f"device {name} can't be used", error)
    return probe.device


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: getting it back would cost page faults."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def choose_precision(config: Config, device: torch.device) -> str:
    """Return the precision of matrix products: bfloat16 where the hardware is made for it."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":  # old GPUs only emulate it
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    else:
        native = False
    return "bfloat16" if native else "float32"


def compile_blocks(model: Transformer, config: Config, device: torch.device) -> None:
    """Compile the blocks one by one: they share their code, so it is compiled only once."""
    if config.compile == "off" or (config.compile == "auto" and device.type != "cuda"):
        return
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:
        say(f"continuing without torch.compile, which doesn't work here ({in_one_line(error)})")
        return
    for block in model.blocks:
        block.compile(dynamic=False)


def in_parallel(model: Transformer, world: int) -> nn.Module:
    """Return the model wrapped to average gradients over all processes."""
    if world == 1:
        return model
    some_unused = model.depth < len(model.blocks)  # DDP must not wait for their gradients
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=some_unused)


class RecordedUpdate:
    """Runs Trainer.update as one CUDA graph; launching kernels one by one takes twice as long."""

    def __init__(self, update: Callable[[Tensor, Tensor], Tensor]):
        self.update = update
        self.calls = 0
        self.graph = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= 3:  # ordinary steps first: they compile, and AdamW allocates its averages
            return self.update(images, labels)
        if self.graph is None:
            self.record(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.loss

    def record(self, images: Tensor, labels: Tensor) -> None:
        """Record one update, without running it, on tensors that each replay reads."""
        self.images = images.clone()
        self.labels = labels.clone()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: a DataLoader's thread (mini_vit_augment.py's) may pin memory meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss = self.update(self.images, self.labels)


def say_what_trains(trainer: Trainer) -> None:
    """Print the device, the precision and the number of parameters."""
    device = trainer.device
    kind = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    processes = f", {trainer.world} processes" if trainer.world > 1 else ""
    say(f"device: {device} ({kind}), {trainer.model.precision}{processes}")
    say(f"parameters: {sum(p.numel() for p in trainer.model.parameters()):,}")


# ---------------------------------------------------------------- files
def claim_folder(config: Config, resume: bool) -> None:
    """Lock out_dir for a new run or, if it holds another one, the next free of -2, -3, ...

    With resume, it must be out_dir itself. The choice is noted in config.out_dir.
    """
    wanted = config.out_dir
    for n in itertools.count(2):
        folder = Path(config.out_dir)
        if not holds_run(folder) and lock_folder(folder):
            if not holds_run(folder):  # a run may have finished in it just before the lock
                break
            lock_of(folder.absolute()).release()
        if resume:
            fail(f"another process has begun the run in {folder}")
        config.out_dir = f"{wanted}-{n}"
    if config.out_dir != wanted:
        say(f"{wanted} holds another run; this one goes into {config.out_dir}")
    write_log([], folder)  # in place of the log of a run that was never saved
    flags = f"--resume --out_dir {shlex.quote(config.out_dir)}"
    say(f"to go on if this run is stopped: the same command with {flags}")


def holds_run(folder: Path) -> bool:
    """Return whether a folder holds a run that can go on or is finished."""
    return (folder / "checkpoint.pt").exists() or (folder / "model.pt").exists()


def lock_folder(folder: Path, seconds: float = 0) -> bool:
    """Lock a folder until this process ends; return whether that worked within these seconds."""
    with writing_into(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock_of(folder.absolute()).acquire(timeout=seconds)
        except Timeout:
            return False
    return True


@functools.cache  # it keeps the lock: one that nobody refers to would be released
def lock_of(folder: Path) -> FileLock:
    """Return the lock of a folder. When a process ends, however it does, the system frees its."""
    return FileLock(folder / ".lock")


def save(trainer: Trainer, name: str) -> None:
    """Write checkpoint.pt or, once training is done, model.pt in its place."""
    state = trainer.state_dict()
    if name == "model.pt":
        del state["optimizer"]
    folder = Path(trainer.config.out_dir)
    temporary = folder / "saving.tmp"  # if the run is killed meanwhile, the next save replaces it
    with writing_into(folder):
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / name)
        if name == "model.pt":
            (folder / "checkpoint.pt").unlink(missing_ok=True)


def write_log(log: list[dict], folder: Path) -> None:
    """Write log.csv, a row per evaluation."""
    # The rows of a resumed run may differ, if you have added a column.
    columns = dict.fromkeys(name for row in log for name in row)
    with writing_into(folder), open(folder / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turn an error of writing into a folder into one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises the latter when a disk is full
        fail(f"can't write into {folder}", error)


def load_checkpoint(folder: Path) -> dict | None:
    """Lock a folder and return its checkpoint; None if its run is yet to start, or is finished."""
    path = folder / "checkpoint.pt"
    # The workers of a killed process, if it had any, hold its lock for some seconds more. Only one
    # of several processes locks: torchrun ends the old ones before it starts new ones.
    if path.exists() and rank_and_world()[0] == 0 and not lock_folder(folder, seconds=20):
        fail(f"another process is training in {folder}")
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != SCRIPT:
            raise ValueError(f"it is from {checkpoint['script']}.py")
        Config(**checkpoint["config"])  # raises TypeError if a field is unknown
    except Exception as error:  # torch raises many kinds
        fail(f"{path} is damaged, or not from this version of {FILE.name}", error)
    return checkpoint


# ---------------------------------------------------------------- command line
def make_parser() -> argparse.ArgumentParser:
    """Return a parser with a flag for each field of Config, and --resume."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", SOURCE, re.MULTILINE))
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(FILE.name, description=description, allow_abbrev=False)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in out_dir, or start it"
    )
    for f in fields(Config):
        text = f"{comments.get(f.name, '')} (default: {f.default})".replace("%", "%%").strip()
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif choices := get_args(f.type):  # of a Literal
            options = {"choices": choices}
        else:
            options = {"type": f.type, "metavar": f.type.__name__}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **options)
    return parser


def say_what_changes(checkpoint: dict, config: Config) -> None:
    """Print from which step a run goes on, and the settings that flags change."""
    line = f"going on with {config.out_dir} from step {checkpoint['iter']}"
    for name, before in checkpoint["config"].items():
        value = getattr(config, name)
        if value == before or name == "out_dir":
            continue
        if name in ("seed", "n_head", "d_head"):  # weights would fit, but be of another run
            fail(f"--{name} can't change on --resume: the run in {config.out_dir} has {before}")
        line += f", {name} {value} (so far {before})"
    if checkpoint["iter"] >= config.max_iters:
        fail(f"{config.out_dir} is already at step {checkpoint['iter']}: raise --max_iters")
    say(line)


def fail(message: str, error: Exception | None = None) -> NoReturn:
    """End with one line on stderr and exit status 1; the line names the cause, if there is one."""
    if error:
        message = f"{message} ({in_one_line(error)})"
    raise SystemExit(f"{FILE.name}: error: {message}")


def in_one_line(error: Exception) -> str:
    """Return the beginning of an error's message, or its type; torch's have many lines."""
    return textwrap.shorten(str(error), 300) or type(error).__name__


def main(argv: list[str] | None = None) -> None:
    """Run the command line, sys.argv if argv is None."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    folder = Path(os.path.expanduser(given.get("out_dir", Config.out_dir)))
    checkpoint = load_checkpoint(folder) if resume else None
    settings = checkpoint["config"] if checkpoint else {}
    settings = settings | given | {"out_dir": str(folder)}  # flags that are given win
    try:
        config = Config(**settings)
    except ValueError as error:
        parser.error(str(error))
    if checkpoint:
        say_what_changes(checkpoint, config)
    elif resume and (folder / "model.pt").exists():
        say(f"{folder} holds a finished run: there is nothing to do")
        return
    try:
        train(config, checkpoint, resume)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search("(allocate|out of) memory", str(error)):
            fail("out of memory: lower batch_size", error)
        if not re.search("(closed|reset) by peer|remote process exited", str(error)):
            raise
        sys.exit(1)  # another of several processes has ended, and has said why


if __name__ == "__main__":
    main()
