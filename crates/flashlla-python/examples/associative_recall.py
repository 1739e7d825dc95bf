"""A two-layer LLA transformer learns associative recall.

A sequence lists pairs of a key and its value, then asks for every key once more, in another order; the model is to say the
value at every such place. Prints the loss curve and the share of right answers on new sequences.

    python examples/associative_recall.py                     # on the CPU, under 3 minutes
    python examples/associative_recall.py --device cuda
    python examples/associative_recall.py --steps 20 --reference   # the same model, attention by the dense reference
"""

from __future__ import annotations

import argparse
import time

import torch
from flashlla.nn import LocalLinearAttention
from flashlla.ops.naive import lla_forward_naive
from torch import Tensor, nn
from torch.nn import functional as F

PAIRS = 8
SYMBOLS = 16  # keys, and as many values


class Dense(LocalLinearAttention):
    """The same module, its attention computed by the dense reference."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, ridge, scale, **options) -> Tensor:
        b, n, h, _ = q.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out, *_ = lla_forward_naive(q, k, v, scale.repeat(b)[:, None, None], ridge.repeat(b)[:, None], 0.0)
        return out.unflatten(0, (b, h)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attention: type[LocalLinearAttention]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = attention(width, heads, causal=True, rope=True, qk_norm=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Recall(nn.Module):
    def __init__(self, width: int = 64, heads: int = 2, layers: int = 2, reference: bool = False) -> None:
        super().__init__()
        attention = Dense if reference else LocalLinearAttention
        self.embed = nn.Embedding(2 * SYMBOLS, width)
        self.blocks = nn.Sequential(*(Block(width, heads, attention) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, SYMBOLS))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens)))


def sequences(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens `[batch, 4 PAIRS]`, and the value to be said at each of the PAIRS questions `[batch, PAIRS]`."""

    def shuffled(n: int) -> Tensor:
        return torch.rand(batch, n, generator=generator).argsort(1)

    keys = shuffled(SYMBOLS)[:, :PAIRS]
    values = torch.randint(SYMBOLS, (batch, PAIRS), generator=generator)
    order = shuffled(PAIRS)
    asked, answers = keys.gather(1, order), values.gather(1, order)
    listed = torch.stack((keys, values + SYMBOLS), 2).flatten(1)
    questions = torch.stack((asked, answers + SYMBOLS), 2).flatten(1)
    return torch.cat((listed, questions), 1), answers


def at_questions(logits: Tensor) -> Tensor:
    return logits[:, 2 * PAIRS :: 2]


def train(
    steps: int,
    reference: bool = False,
    device: str = "cpu",
    batch: int = 64,
    seed: int = 0,
    quiet: bool = False,
) -> tuple[list[float], float]:
    """The loss of every step, and the share of right answers on new sequences afterwards."""
    torch.manual_seed(seed)
    model = Recall(reference=reference).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 50))
    generator = torch.Generator().manual_seed(seed)
    losses, began = [], time.perf_counter()
    for step in range(steps):
        tokens, answers = (x.to(device) for x in sequences(batch, generator))
        loss = F.cross_entropy(at_questions(model(tokens)).flatten(0, 1), answers.flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if not quiet and (step % max(1, steps // 20) == 0 or step == steps - 1):
            bar = "#" * round(20 * losses[-1])
            print(f"step {step:5d}  {time.perf_counter() - began:6.1f} s  loss {losses[-1]:.4f}  {bar}", flush=True)
    with torch.no_grad():
        tokens, answers = (x.to(device) for x in sequences(512, generator))
        right = (at_questions(model(tokens)).argmax(-1) == answers).float().mean().item()
    return losses, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reference", action="store_true", help="compute attention by the dense reference")
    args = parser.parse_args()
    _, right = train(args.steps, args.reference, args.device)
    print(f"right answers on new sequences: {right:.1%}")


if __name__ == "__main__":
    main()
