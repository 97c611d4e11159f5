"""The networks of `benchmarks/training_gpu.py` in PyTorch, compiled, trained with the same step on the same batch.

Runs in an environment of its own with torch alone (and, for `torch.compile`, what that needs):

    python benchmarks/peers/training.py [--tiny] [--eager]

Same layers, sizes and number of parameters as `diffjax.networks.UNet` and `DiT` (the numbers are printed: compare), in
bfloat16 by autocast with float32 parameters, Adam with clipping, and an average of the parameters.  Prints JSON as the
other side does; FLOPs by torch's own counter, forward and backward.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

CLASSES = 10
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "V100": 125}
SIZES: dict[str, dict[str, Any]] = {
    "unet": {"channels": (128, 256, 256), "blocks": 2, "attention": (16,), "heads": 4, "groups": 32},
    "dit": {"width": 384, "depth": 12, "heads": 6},
}
TINY: dict[str, dict[str, Any]] = {
    "unet": {"channels": (8, 16), "blocks": 1, "attention": (), "heads": 2, "groups": 4},
    "dit": {"width": 16, "depth": 2, "heads": 2},
}


class Embedding(nn.Module):
    """Time and class as one vector."""

    def __init__(self, size: int, features: int = 64):
        super().__init__()
        self.features = features
        self.first, self.second = nn.Linear(features, size), nn.Linear(size, size)
        self.table = nn.Embedding(CLASSES + 1, size)

    def forward(self, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """(B,), (B,) -> (B, size)."""
        half = self.features // 2
        rates = torch.exp(-math.log(1e4) / half * torch.arange(half, device=t.device))
        angles = 1000 * t[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return F.silu(self.second(F.silu(self.first(waves))) + self.table(label))


class Attention(nn.Module):
    """Self-attention of (B, N, D)."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = nn.Linear(size, size), nn.Linear(size, 2 * size), nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)."""
        parts = (self.query(x), *self.key_value(x).chunk(2, -1))
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        return self.out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """adaLN-zero."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.modulate, self.attention = nn.Linear(width, 6 * width), Attention(width, heads)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """(B, N, D), (B, D) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(e)[:, None].chunk(6, -1)
        norm = lambda h: F.layer_norm(h, h.shape[-1:], eps=1e-6)
        h = h + gate1 * self.attention(norm(h) * (1 + scale1) + shift1)
        inner = F.gelu(self.mlp_in(norm(h) * (1 + scale2) + shift2), approximate="tanh")
        return h + gate2 * self.mlp_out(inner)


class DiT(nn.Module):
    """Patches of 2 x 2, channels first outside."""

    def __init__(self, side: int, width: int, depth: int, heads: int, channels: int = 4):
        super().__init__()
        self.side, self.embed, self.stem = side, Embedding(width), nn.Linear(4 * channels, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.modulate, self.out = nn.Linear(width, 2 * width), nn.Linear(width, 4 * channels)
        index = torch.arange((side // 2) ** 2)
        angles = torch.exp(-math.log(1e4) * torch.arange(width // 4) / (width // 4))
        parts = [part[:, None] * angles for part in (index // (side // 2), index % (side // 2))]
        waves = torch.cat([wave for a in parts for wave in (a.sin(), a.cos())], -1)
        self.register_buffer("positions", waves, persistent=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
        e = self.embed(t, label)
        h = self.stem(F.unfold(x, 2, stride=2).transpose(1, 2)) + self.positions
        for block in self.blocks:
            h = block(h, e)
        shift, scale = self.modulate(e)[:, None].chunk(2, -1)
        h = self.out(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        return F.fold(h.transpose(1, 2), (self.side, self.side), 2, stride=2)


class Block(nn.Module):
    """Residual block with adaptive group norm, and attention where `heads`."""

    def __init__(self, size: int, out: int, embedding: int, heads: int | None, groups: int):
        super().__init__()
        self.groups = groups
        self.first, self.second = nn.Conv2d(size, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * out)
        self.skip = nn.Identity() if size == out else nn.Conv2d(size, out, 1)
        self.attention = None if heads is None else Attention(out, heads)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """(B, a, H, W), (B, E) -> (B, b, H, W)."""
        scale, shift = self.modulate(e)[:, :, None, None].chunk(2, 1)
        h = self.first(F.silu(F.group_norm(x, self.groups)))
        h = F.group_norm(h, self.groups) * (1 + scale) + shift
        x = self.skip(x) + self.second(F.silu(h))
        if self.attention is None:
            return x
        pixels = F.group_norm(x, self.groups).flatten(2).transpose(1, 2)
        return x + self.attention(pixels).transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """As `diffjax.networks.UNet`: resolutions change by patch projections."""

    def __init__(self, side: int, channels: tuple, blocks: int, attention: tuple, heads: int, groups: int):
        super().__init__()
        embedding, self.groups, last = 4 * channels[-1], groups, len(channels) - 1
        attends = [heads if side >> level in attention else None for level in range(len(channels))]
        self.embed = Embedding(embedding, 2 * channels[0])
        self.stem, self.out = nn.Conv2d(3, channels[0], 3, padding=1), nn.Conv2d(channels[0], 3, 3, padding=1)
        make = lambda size, level, attend: Block(size, channels[level], embedding, attend, groups)
        levels = list(enumerate(channels))
        self.down = nn.ModuleList(nn.ModuleList(make(c, n, attends[n]) for _ in range(blocks)) for n, c in levels)
        self.up = nn.ModuleList(nn.ModuleList(make(2 * c, n, attends[n]) for _ in range(blocks)) for n, c in levels)
        pairs = list(itertools.pairwise(channels))
        self.shrink = nn.ModuleList(nn.Conv2d(4 * a, b, 1) for a, b in pairs)
        self.grow = nn.ModuleList(nn.Conv2d(b, 4 * a, 1) for a, b in pairs)
        self.middle = nn.ModuleList(make(channels[last], last, attend) for attend in (heads, None))

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), (B,), (B,) -> (B, 3, H, W)."""
        e, h, skips = self.embed(t, label), self.stem(x), []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, e)
                skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](F.pixel_unshuffle(h, 2))
        for block in self.middle:
            h = block(h, e)
        for level in reversed(range(len(self.up))):
            if level < len(self.grow):
                h = F.pixel_shuffle(self.grow[level](h), 2)
            for block in self.up[level]:
                h = block(torch.cat([h, skips.pop()], 1), e)
        return self.out(F.silu(F.group_norm(h, self.groups)))


def measure(name: str, tiny: bool, eager: bool) -> dict[str, Any]:
    """Steps per second, the median of spells, and what they make of the device."""
    device, side, batch = "cuda" if torch.cuda.is_available() else "cpu", 8 if tiny else 32, 2 if tiny else 256
    arguments = (TINY if tiny else SIZES)[name]
    model = (UNet(side, **arguments) if name == "unet" else DiT(side, **arguments)).to(device)
    x0 = torch.randn(batch, 3 if name == "unet" else 4, side, side, device=device)
    label = torch.arange(batch, device=device) % CLASSES
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimiser = torch.optim.Adam(parameters, 1e-3, fused=device == "cuda")
    network = model if eager else torch.compile(model)

    def loss() -> torch.Tensor:
        t, eps = torch.rand(batch, device=device), torch.randn_like(x0)
        told = torch.where(torch.rand(batch, device=device) < 0.1, CLASSES, label)
        s = t[:, None, None, None]
        with torch.autocast(device, torch.bfloat16):
            output = network((1 - s) * x0 + s * eps, t, told)
        return F.mse_loss(output.float(), eps - x0)

    def step() -> torch.Tensor:
        optimiser.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 0.001)
        return value

    def done() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    begin = time.perf_counter()
    for _ in range(3):
        step()
    done()
    warm, spells, spell = time.perf_counter() - begin, [], 1 if tiny else 20
    for _ in range(3 if tiny else 10):
        begin = time.perf_counter()
        for _ in range(spell):
            step()
        done()
        spells.append((time.perf_counter() - begin) / spell)
    network = model  # the counter sees no compiled operations; `loss` looks the name up
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    seconds, kind = statistics.median(spells), torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak = next((1e12 * value for part, value in PEAKS.items() if part in kind), None)
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "batch": batch,
        "seconds to compile": round(warm, 1),
        "steps per second": round(1 / seconds, 2),
        "gigaflops a step": round(counter.get_total_flops() / 1e9, 2),
        "utilisation": None if peak is None else round(counter.get_total_flops() / seconds / peak, 3),
    }


def main() -> None:
    """Both networks, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small networks, on any machine")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    found = {name: measure(name, options.tiny, options.eager) for name in SIZES}
    print(json.dumps({"torch": torch.__version__, **found}, indent=1))


if __name__ == "__main__":
    main()
