"""`python -m flashlla info` and `python -m flashlla bench`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any

import flashlla
from flashlla import _flashlla


def _cuda() -> dict[str, Any]:
    try:
        return {"available": True, **_flashlla.cuda_info(0)}
    except RuntimeError as error:
        return {"available": False, "reason": str(error)}


def _info() -> dict[str, Any]:
    torch: str | None
    try:
        import torch as module

        torch = module.__version__
    except ImportError:
        torch = None
    return {
        "flashlla": flashlla.__version__,
        "python": platform.python_version(),
        "torch": torch,
        "platform": f"{platform.system()} {platform.machine()}",
        "instruction_set": _flashlla.instruction_set(),
        "threads": flashlla.get_num_threads(),
        "max_head_dim": _flashlla.MAX_HEAD_DIM,
        "cuda": _cuda(),
    }


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not allowed; it must be BATCH,HEADS,TOKENS,DIM")
    return sizes


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not allowed; it must be an integer of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flashlla", description="Local Linear Attention for Python.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, instruction set, GPU")
    bench = commands.add_parser("bench", help="time it against PyTorch's attention and the dense reference")
    bench.add_argument("--shape", type=_shape, action="append", metavar="B,H,N,D", help="default 1,8,1024,64")
    bench.add_argument("--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="float32")
    bench.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    bench.add_argument("--ridge", type=float, default=10.0, help="default 10")
    bench.add_argument("--full", action="store_true", help="every query sees every key (default: causal)")
    bench.add_argument("--repeats", type=_count, default=5, help="runs of which the median is shown")
    for command in (info, bench):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from flashlla.bench import measure

    rows = []
    for shape in args.shape or [(1, 8, 1024, 64)]:
        options: dict[str, Any] = {"dtype": getattr(torch, args.dtype), "device": args.device, "ridge": args.ridge}
        measured = measure(shape, causal=not args.full, repeats=args.repeats, **options)
        rows += [{"shape": list(shape), **row} for row in measured]
    return rows


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        result: Any = _info() if args.command == "info" else _bench(args)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        # PyTorch's errors can have many lines.
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result, indent=2))
    elif args.command == "info":
        for name, value in result.items():
            if isinstance(value, dict):
                for inner, x in value.items():
                    print(f"{f'{name}.{inner}':<18}  {x}")
            else:
                print(f"{name:<18}  {value}")
    else:
        print(f"{'shape':<18}  {'method':<10}  {'forward':>12}  {'backward':>12}")
        for row in result:
            times = (f"{row[name]:9.3f} ms" for name in ("forward_ms", "backward_ms"))
            print(f"{','.join(map(str, row['shape'])):<18}  {row['method']:<10}  " + "  ".join(times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
