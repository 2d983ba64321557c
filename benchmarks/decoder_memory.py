"""Memory and time of decoding one image whole and in tiles in ONNX Runtime, by a decoder as large as Stable Diffusion's (random
weights).

Each case runs in a process of its own, which says the peak of its resident memory, less the peak before the decoder was opened.

    python benchmarks/decoder_memory.py --size 128 --tiles 0 64 32
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mteo_deploy.machine import peak_bytes

CHANNELS, SCALE = 4, 8


def make(path: Path) -> None:
    """The decoder's graph, height and width open; its weights beside it."""
    import onnx_ir as ir
    import torch
    from diffusers import AutoencoderKL

    from mteo_deploy.exporters.decoder import Decoder
    from mteo_deploy.exporters.trace import trace_decoder

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    model = trace_decoder(Decoder(vae), (CHANNELS, 32, 32), ("height", "width"))
    ir.save(model, path, external_data="weights.bin")


def measure(path: Path, size: int, tile: int) -> dict[str, float]:
    """Decode one image in this process: ``bytes`` that the peak grew, ``seconds``."""
    import numpy as np
    import onnxruntime

    from mteo_deploy.decoding import decode_states

    latents = np.random.default_rng(0).standard_normal((1, CHANNELS, size, size), dtype=np.float32)
    before = peak_bytes()
    if before is None:
        raise SystemExit("expected a platform that tells a process's peak memory; found another")
    opened = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    class Session:
        def run(self, feeds: Any) -> list[Any]:
            return list(opened.run(None, feeds))

    clock = time.perf_counter()
    images = decode_states(Session(), {"scale": SCALE}, latents, tile or None)  # type: ignore[arg-type]
    assert images.shape == (1, 3, SCALE * size, SCALE * size)
    return {"seconds": time.perf_counter() - clock, "bytes": (peak_bytes() or 0) - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="height and width of the latents")
    parser.add_argument("--tiles", type=int, nargs="+", default=[0, 64, 32], help="of latents; 0: the whole image")
    parser.add_argument("--graph", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.graph:
        print(json.dumps(measure(args.graph, args.size, args.tiles[0])))
        return
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        graph = Path(directory) / "decoder.onnx"
        make(graph)
        for tile in args.tiles:
            command = [sys.executable, __file__, "--graph", str(graph), "--size", str(args.size), "--tiles", str(tile)]
            found[tile] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    table = Table("tile", "MB at the peak", "seconds")
    for tile, one in found.items():
        table.add_row(str(tile or "whole"), f"{one['bytes'] / 1e6:,.0f}", f"{one['seconds']:.1f}")
    Console().print(table)
    print(json.dumps({"size": args.size, "found": found}))


if __name__ == "__main__":
    main()
