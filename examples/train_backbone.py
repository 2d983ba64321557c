"""Train a small backbone (eps-prediction, DDPM schedule) and save it as a diffusers pipeline directory: an unconditional
UNet2DModel, or a DiTTransformer2DModel with class labels, which are left out for a share of the images, for guidance.

The data may be a folder of images, a zip or tar of one, or an npz holding one uint8 array of images
``[count, height, width]`` or ``[count, height, width, channels]``. Everything a run needs to go on is in one
safetensors checkpoint; batches depend on the seed and the iteration number only, so a resumed run sees the batches that
an uninterrupted one would have seen.

    python examples/train_backbone.py mnist_train.npz -o runs/mnist
    python examples/train_backbone.py mnist_train.npz -o runs/mnist-dit --architecture dit    # labels: from the npz too
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from mteo_deploy.dataset import read
from mteo_deploy.errors import InputError


def load_images(source: Path, size: int, channels: int) -> torch.Tensor:
    """Load every image as uint8 ``[count, channels, size, size]``."""
    try:
        return torch.from_numpy(read(source, (size, size), channels))
    except InputError as error:
        raise SystemExit(str(error)) from None


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    if args.architecture == "dit":
        return make_dit(args)
    from diffusers import UNet2DModel

    levels = len(args.block_out_channels)
    attention = [level in args.attention_levels for level in range(levels)]
    return UNet2DModel(
        sample_size=args.size,
        in_channels=args.channels,
        out_channels=args.channels,
        layers_per_block=args.layers_per_block,
        block_out_channels=tuple(args.block_out_channels),
        norm_num_groups=args.norm_num_groups,
        attention_head_dim=args.attention_head_dim,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
    )


def load_model(args: argparse.Namespace, pipeline: Path) -> torch.nn.Module:
    model = make_model(args)
    model.load_state_dict(load_file(pipeline / PARTS[args.architecture] / "diffusion_pytorch_model.safetensors"))
    return model


class Guided:
    """What a student of autoguidance learns (Karras et al. 2024, arXiv 2406.02507, equation 1): the prediction of a good
    backbone, moved away from that of a worse one of the same kind, ``worse + guidance * (good - worse)``, at timesteps inside
    the interval (Kynkäänniemi et al. 2024, arXiv 2404.07724) and not moved outside it."""

    def __init__(self, good: torch.nn.Module, worse: torch.nn.Module, guidance: float, interval: tuple[int, int]) -> None:
        self.good, self.worse, self.guidance, self.interval = good.eval(), worse.eval(), guidance, interval

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        good, worse = self.good(x, t).sample.float(), self.worse(x, t).sample.float()
        inside = ((t >= self.interval[0]) & (t <= self.interval[1])).view(-1, 1, 1, 1)
        return torch.where(inside, worse + self.guidance * (good - worse), good)


def make_scheduler():
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def draw_timesteps(density: str, count: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps int64 ``[batch]`` in ``[0, count)``.

    ``logit-normal`` (Esser et al. 2024, arXiv 2403.03206, section 3.1; location 0, scale 1) trains most in the middle,
    where the shape of an image is decided, and little at both ends.
    """
    if density == "uniform":
        return torch.randint(count, (batch,), generator=generator)
    return (torch.randn(batch, generator=generator).sigmoid() * count).long().clamp(max=count - 1)


def make_dit(args: argparse.Namespace) -> torch.nn.Module:
    """A DiT that starts as the identity (Peebles & Xie 2023, arXiv 2212.09748, section 3.2); its last label is no class."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=args.heads,
        attention_head_dim=args.attention_head_dim,
        in_channels=args.channels,
        out_channels=args.channels,
        num_layers=args.layers,
        sample_size=args.size,
        patch_size=args.patch_size,
        num_embeds_ada_norm=args.classes,
    )
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # every block would leave out other labels: we do, alike in all
    for layer in [*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2]:
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    return model


def load_labels(source: Path, count: int) -> torch.Tensor:
    """Class labels int64 ``[count]``: the array ``labels`` or ``y`` of an npz."""
    import numpy as np

    found = None
    if source.suffix == ".npz":
        with np.load(source, allow_pickle=False) as arrays:
            found = next((arrays[name] for name in ("labels", "y") if name in arrays), None)
    if found is None or found.shape != (count,) or found.dtype.kind not in "iu" or found.min() < 0:
        raise SystemExit(
            f"{source}: expected an npz with an array labels or y, an integer from 0 on for each image; found none"
        )
    return torch.from_numpy(found.astype(np.int64))


def leave_out(labels: torch.Tensor, classes: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """The labels, a share of them replaced by the one for no class (Ho & Salimans 2022, arXiv 2207.12598, algorithm 1)."""
    return labels.masked_fill(torch.rand(len(labels), generator=generator) < share, classes)


PARTS = {"unet": "unet", "dit": "transformer"}  # architecture -> the pipeline's folder of the network


def save_pipeline(model: torch.nn.Module, architecture: str, directory: Path) -> None:
    """A diffusers pipeline directory. That of a DiT has no VAE, so diffusers' DiTPipeline does not open it whole."""
    if architecture == "unet":
        from diffusers import DDPMPipeline

        DDPMPipeline(unet=model, scheduler=make_scheduler()).save_pretrained(directory)
        return
    model.save_pretrained(directory / PARTS[architecture])
    make_scheduler().save_pretrained(directory / "scheduler")
    parts = {PARTS[architecture]: ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (directory / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **parts}, indent=2) + "\n")


class Checkpoint:
    """Model, moving average and Adam moments in one safetensors file, replaced atomically."""

    def __init__(self, path: Path, model: torch.nn.Module, ema: dict[str, torch.Tensor], optimizer: torch.optim.AdamW):
        self.path, self.model, self.ema, self.optimizer = path, model, ema, optimizer

    def save(self, iteration: int, seconds: float) -> None:
        tensors = {f"model/{k}": v.detach().clone() for k, v in self.model.state_dict().items()}
        tensors |= {f"ema/{k}": v.clone() for k, v in self.ema.items()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors |= {f"adam/{key}/{name}": state[key].clone() for key in ("exp_avg", "exp_avg_sq", "step")}
        temporary = self.path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"iteration": str(iteration), "seconds": str(seconds)})
        os.replace(temporary, self.path)

    def load(self) -> tuple[int, float]:
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        self.model.load_state_dict({k[len("model/") :]: v for k, v in tensors.items() if k.startswith("model/")})
        self.ema.update({k[len("ema/") :]: v for k, v in tensors.items() if k.startswith("ema/")})
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {key: tensors[f"adam/{key}/{name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        return int(metadata["iteration"]), float(metadata["seconds"])


def train(
    args: argparse.Namespace, images: torch.Tensor, bar: Progress, labels: torch.Tensor | None = None
) -> tuple[torch.nn.Module, float]:
    """Run (or go on with) the training and return the model holding the averaged weights, and the seconds spent."""
    torch.manual_seed(args.seed)
    model = make_model(args)
    if args.init:
        model.load_state_dict(load_model(args, args.init).state_dict())
    guided = None
    if args.guide:
        guided = Guided(load_model(args, args.init), load_model(args, args.guide), args.guidance, args.guidance_interval)
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, betas=(0.9, 0.99))
    checkpoint = Checkpoint(args.output / "checkpoint.safetensors", model, ema, optimizer)
    start, spent = checkpoint.load() if checkpoint.path.exists() else (0, 0.0)
    alphas_cumprod = make_scheduler().alphas_cumprod
    task = bar.add_task("training", total=args.iterations, completed=start, loss="-")
    clock, average, log = time.monotonic() - spent, None, (args.output / "log.jsonl").open("a")
    for iteration in range(start, args.iterations):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
        rows = torch.randint(len(images), (args.batch,), generator=generator)
        x0 = images[rows].float() / 127.5 - 1
        if args.flip:
            x0 = torch.where(torch.rand(args.batch, 1, 1, 1, generator=generator) < 0.5, x0.flip(-1), x0)
        noise = torch.randn(x0.shape, generator=generator)
        t = draw_timesteps(args.timesteps, len(alphas_cumprod), args.batch, generator)
        told = {}
        if labels is not None:
            told["class_labels"] = leave_out(labels[rows], args.classes, args.label_dropout, generator)
        alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast), sdpa_kernel(SDPBackend.MATH):
            x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
            prediction, target = model(x, timestep=t, **told).sample, noise if guided is None else guided(x, t)
        loss = (prediction.float() - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm = min(1.0, (iteration + 1) / args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * iteration / args.iterations)))
        optimizer.step()
        decay = args.ema if args.init else min(args.ema, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                ema[name].lerp_(value, 1 - decay) if value.is_floating_point() else ema[name].copy_(value)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.update(task, advance=1, loss=f"{average:.4f}")
        if (iteration + 1) % 100 == 0:
            log.write(json.dumps({"iteration": iteration + 1, "loss": average, "seconds": time.monotonic() - clock}) + "\n")
            log.flush()
        if (iteration + 1) % args.checkpoint_every == 0 or iteration + 1 == args.iterations:
            checkpoint.save(iteration + 1, time.monotonic() - clock)
    log.close()
    model.load_state_dict(ema)
    return model.eval(), time.monotonic() - clock


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="image folder, zip or tar of one, or npz")
    parser.add_argument("-o", "--output", type=Path, required=True, help="run directory; the pipeline goes to OUTPUT/pipeline")
    parser.add_argument("--init", type=Path, help="pipeline directory of the same architecture to start from")
    parser.add_argument("--guide", type=Path, help="worse pipeline to be guided away from: learn INIT's autoguided prediction")
    parser.add_argument("--guidance", type=float, default=2.5, help="weight of autoguidance; 1 is INIT itself")
    parser.add_argument("--guidance-interval", type=int, nargs=2, default=[0, 999], help="timesteps that are guided")
    parser.add_argument("--size", type=int, default=28, help="height and width in pixels")
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3))
    parser.add_argument("--block-out-channels", type=int, nargs="+", default=[32, 64, 96])
    parser.add_argument("--layers-per-block", type=int, default=1)
    parser.add_argument("--attention-levels", type=int, nargs="*", default=[2], help="levels with attention, 0 = full size")
    parser.add_argument("--attention-head-dim", type=int, default=32)
    parser.add_argument("--norm-num-groups", type=int, default=8)
    parser.add_argument("--architecture", choices=tuple(PARTS), default="unet")
    parser.add_argument("--layers", type=int, default=4, help="blocks of a DiT")
    parser.add_argument("--heads", type=int, default=4, help="attention heads of a DiT, --attention-head-dim wide each")
    parser.add_argument("--patch-size", type=int, default=4, help="pixels along an axis that a DiT sees as one token")
    parser.add_argument("--label-dropout", type=float, default=0.1, help="share of images whose label a DiT is not told")
    parser.add_argument("--iterations", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200, help="iterations of linear warm-up")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the moving average of the weights")
    parser.add_argument("--flip", action="store_true", help="mirror half of the images")
    parser.add_argument("--timesteps", choices=("uniform", "logit-normal"), default="uniform", help="density trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    parser.add_argument("--fp16", action="store_true", help="store the weights in half precision")
    parser.add_argument("--checkpoint-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.guide and not args.init:
        parser.error("--guide wants --init: the backbone that is guided")
    if args.architecture == "dit" and args.guide:
        parser.error("--guide is for a UNet: a DiT is guided by its labels, when it is exported")
    if args.architecture == "dit" and args.size % args.patch_size:
        parser.error(f"--patch-size divides --size; {args.patch_size} does not divide {args.size}")
    return args


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    images = load_images(args.data, args.size, args.channels)
    labels = load_labels(args.data, len(images)) if args.architecture == "dit" else None
    args.classes = 0 if labels is None else int(labels.max()) + 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn()) as bar:
        model, seconds = train(args, images, bar, labels)
    model = model.half() if args.fp16 else model
    save_pipeline(model, args.architecture, args.output / "pipeline")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(images)} images, {parameters} parameters, {args.iterations} iterations, {seconds:.0f} s")
    print(f"saved {args.output / 'pipeline'}")


if __name__ == "__main__":
    main()
