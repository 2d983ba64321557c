"""A large model through every verb: a random UNet of Stable Diffusion 1.5's published configuration (859,520,964 parameters).

Weights are random, saved in shards as diffusers does. Each verb runs in a process of its own, which is watched from here:
seconds, seconds of processor time, the peak of its resident memory and the peak of its anonymous memory. What lies between the
two is mapped files: weights, which the system reads when they are used and drops when memory is short.

    python benchmarks/large.py --steps 2 --latents 64 --engines onnxruntime openvino
    python benchmarks/large.py --dtype float16 --engines                               # export alone
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mteo_deploy.machine import Watched, watch

SHARD = "1GB"
PARAMETERS = 859_520_964


def make(path: Path, dtype: str, decoder: bool) -> int:
    """The pipeline directory; returns the backbone's parameters."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device("meta"):
        network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.ndim > 1:
                value.normal_(std=value[0].numel() ** -0.5)  # the variance of what goes in
            else:
                value.fill_(float(name.endswith("weight")))
    network.to(getattr(torch, dtype)).save_pretrained(path / "unet", max_shard_size=SHARD)
    parts = {"unet": network}
    if decoder:
        parts["vae"] = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ).to(getattr(torch, dtype))
        parts["vae"].save_pretrained(path / "vae")
    parts["scheduler"] = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    parts["scheduler"].save_pretrained(path / "scheduler")
    index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))
    return sum(value.numel() for value in network.parameters())


def run(verb: str, *arguments: object) -> Watched:
    found = watch([sys.executable, "-m", "mteo_deploy.cli", verb, *map(str, arguments), "--quiet"])
    if found.status != 0 and verb != "verify":  # whose status is its verdict, and a figure of the table
        raise SystemExit(f"{verb} ended with {found.status}")
    print(json.dumps({verb: vars(found)}), flush=True)
    return found


def verbs(scratch: Path, args: argparse.Namespace) -> dict[str, Watched]:
    import numpy as np

    bundle, size = scratch / "bundle", f"{args.latents}x{args.latents}"
    prompt = scratch / "prompt.npz"
    np.savez(prompt, encoder_hidden_states=np.random.default_rng(0).standard_normal((1, 77, 768), np.float32))
    export = ["--model", args.model or scratch / "model", "--plain", "--steps", args.steps, "--size", size, "--batch", 1]
    chosen = [option for name in args.realisations for option in ("--realisation", name)]
    found = {"export": run("export", *export, *chosen, "-o", bundle)}
    for engine in args.engines:
        found[f"build, {engine}"] = run("build", bundle, "--engine", engine, "--realisation", args.realisations[0])
        images = scratch / f"{engine}.npz"
        sample = ["--engine", engine, "--num", 1, "--batch", 1, "--requests", prompt, "-o", images]
        found[f"sample, {engine}"] = run("sample", bundle, *sample)
        found[f"verify, {engine}"] = run("verify", bundle, "--engine", engine, "--seconds", 0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--latents", type=int, default=64, help="height and width of the state")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--engines", nargs="*", default=["onnxruntime", "openvino"])
    parser.add_argument("--realisations", nargs="+", default=["table"], help="to export; the first is built")
    parser.add_argument("--model", type=Path, help="a pipeline directory made before, in place of a new one")
    parser.add_argument("--no-decoder", action="store_true", help="leave the VAE out")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        parameters = PARAMETERS if args.model else make(scratch / "model", args.dtype, not args.no_decoder)
        found = verbs(scratch, args)
    table = Table("verb", "seconds", "of processor", "peak MB", "/ weights", "anonymous MB", "/ weights", "status")
    weights = 4 * parameters
    for verb, watched in found.items():
        memory = [text for b in (watched.peak, watched.anonymous) for text in (f"{b / 1e6:.0f}", f"{b / weights:.2f}")]
        table.add_row(verb, f"{watched.seconds:.0f}", f"{watched.processor:.0f}", *memory, str(watched.status))
    Console(width=120).print(table)
    line = json.dumps({"parameters": parameters, "dtype": args.dtype, "verbs": {k: vars(v) for k, v in found.items()}})
    print(line)
    if args.output:
        args.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
