"""Train the tiny AutoencoderKLWan on whole rendered clips.

    python -m serve_app.tiny.recipe.train_vae --minutes 8 --work DIR [--resume] [--decoder-only]

Writes DIR/vae (diffusers layout, fp16, averaged weights, true latents_mean/std) and DIR/vae_log.json. --resume
continues from DIR/vae, or from --source (by default the shipped checkpoint) where DIR holds none; the optimiser starts
anew. New latents are new to the experts: train them afterwards (train_experts --resume). --decoder-only leaves the
latents as they are, so the experts need nothing, and a step costs half. --smoke walks the same path in seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from serve_app.tiny import CHECKPOINT
from serve_app.tiny.recipe import fullseq
from serve_app.tiny.recipe.loop import Budget, Ema, Log, from_bytes, learning_rate, pick_device, to_bytes
from serve_app.tiny.recipe.shapes import BACKGROUNDS, degrade, random_scenes, render

CONFIG: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 8],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
MAIN_SIZE = (33, 128, 128)
# Other sizes, one small batch every few steps without compiling: borders, long and single-frame clips must hold up.
OTHER_SIZES = ((1, 128, 128), (17, 96, 160), (9, 64, 64), (13, 160, 96), (5, 192, 192), (49, 64, 96))
# Noise on the normalised latents in training: the decoder must stand the error of a denoiser. It is also the
# posterior's (constant) standard deviation in the exported weights.
LATENT_NOISE = 0.1


def make_pool(
    n: int, size: tuple[int, int, int], generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Render n clips, uint8 [n, 3, T, H, W], and return their background colours too, [n, 3] in [-1, 1].

    One chunk in twelve is degraded.
    """
    clips, grounds = [], []
    chunk = max(1, min(n, 2**27 // (size[0] * size[1] * size[2] * 4)))
    palette = torch.tensor(list(BACKGROUNDS.values()), device=device) / 127.5 - 1
    for i, start in enumerate(range(0, n, chunk)):
        scenes = random_scenes(min(chunk, n - start), generator)
        if i % 12 == 11:
            scenes = degrade(scenes, generator)
        scenes = scenes.to(device)
        clips.append(to_bytes(render(scenes, *size)))
        grounds.append(palette[scenes.background])
    return torch.cat(clips), torch.cat(grounds)


def decoding_loss(vae: AutoencoderKLWan, z: Tensor, clip: Tensor, ground: Tensor, square: float) -> Tensor:
    """Return the error of a clip decoded from noisy latents, weighted towards the objects and their surroundings.

    Objects cover a few per cent of a clip; without the weight an L1 loss is content with their background. `square`
    is the share of the squared error, which the PSNR measures.
    """
    scale = z.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    out = fullseq.decode(vae, z + LATENT_NOISE * scale * torch.randn_like(z)).float()
    mask = ((clip - ground[:, :, None, None, None]).abs().amax(1, keepdim=True) > 0.04).float()
    mask = F.max_pool3d(mask, (1, 9, 9), stride=1, padding=(0, 4, 4))
    error = out - clip
    weight = 1 + 5 * mask
    return (weight * (error.abs() + square * error**2)).mean()


def loss_of(vae: AutoencoderKLWan, clip: Tensor, ground: Tensor, square: float, decoder_only: bool) -> Tensor:
    """Return the whole loss of a batch of clips. With `decoder_only` the encoder gets no gradient."""
    with torch.set_grad_enabled(not decoder_only):
        z = fullseq.encode(vae, clip).float()
    loss = decoding_loss(vae, z, clip, ground, square)
    return loss if decoder_only else loss + 1e-4 * (z**2).mean()


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, clips: Tensor, batch: int = 16, noise: float = 0.0) -> float:
    """Return the mean PSNR of decode(encode(clip)) over clips, in dB for the range 2; `noise` is added to latents."""
    values = []
    for part in clips.split(batch):
        x = from_bytes(part)
        z = fullseq.encode(vae, x)
        z = z + noise * z.std(dim=(0, 2, 3, 4), keepdim=True) * torch.randn_like(z)
        mse = ((fullseq.decode(vae, z).clamp(-1, 1) - x) ** 2).flatten(1).mean(1)
        values.append(10 * torch.log10(4 / mse.clamp(min=1e-10)))
    return float(torch.cat(values).mean())


@torch.no_grad()
def export(vae: AutoencoderKLWan, clips: Tensor | None, folder: Path, batch: int = 16) -> None:
    """Measure latents_mean/std on clips, make the posterior's width constant, and save fp16 weights.

    Without clips the mean and width of the configuration are kept to the last digit.
    """
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    if clips is not None:
        total = torch.cat(
            [fullseq.encode(vae, from_bytes(part)).transpose(0, 1).flatten(1) for part in clips.split(batch)], 1
        )
        mean, std = total.mean(1), total.std(1)
    z = vae.config.z_dim
    config = CONFIG | {
        "latents_mean": [round(v, 6) for v in mean.tolist()],
        "latents_std": [round(v, 6) for v in std.tolist()],
    }
    copy = AutoencoderKLWan(**config)
    copy.load_state_dict(vae.state_dict())
    copy.quant_conv.weight[z:] = 0
    copy.quant_conv.bias[z:] = 2 * (LATENT_NOISE * std.cpu()).log()
    copy.half().save_pretrained(folder)


def train(args: argparse.Namespace) -> None:
    """Train until the minutes are used up, and save."""
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    (work / "vae.done").unlink(missing_ok=True)
    size = (5, 32, 32) if args.smoke else MAIN_SIZE
    rows: list[dict[str, Any]] = []
    if args.decoder_only and not args.resume:
        raise ValueError("--decoder-only needs --resume: an untrained encoder has nothing to decode")
    if args.resume:
        source = work / "vae" if (work / "vae" / "config.json").exists() else Path(args.source) / "vae"
        vae = AutoencoderKLWan.from_pretrained(source, dtype=torch.float32)
        if (work / "vae_log.json").exists():
            rows = json.loads((work / "vae_log.json").read_text())
    else:
        vae = AutoencoderKLWan(**CONFIG)
    vae.to(device)
    log = Log(work / "vae_log.json", rows)
    spent = rows[-1]["minutes"] if rows else 0.0
    step = rows[-1]["step"] if rows else 0
    budget = Budget(args.minutes, 0.0 if args.restart else spent, args.plan)
    pool = make_pool(8 if args.smoke else args.clips, size, generator, device)
    others = [
        make_pool(4 if args.smoke else 96, (s[0], s[1] // 2, s[2] // 2) if args.smoke else s, generator, device)
        for s in (OTHER_SIZES[:1] if args.smoke else OTHER_SIZES)
    ]
    check = make_pool(4 if args.smoke else 64, size, generator, device)[0]
    print(
        f"pools ready after {budget.used * 60:.0f} s, {sum(p.numel() for p in vae.parameters())} parameters", flush=True
    )

    trained = (vae.post_quant_conv, vae.decoder) if args.decoder_only else (vae,)
    parameters = [p for part in trained for p in part.parameters()]
    optimiser = torch.optim.AdamW(
        parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )
    ema = Ema(parameters, 0.998)
    fast = torch.compile(loss_of, dynamic=False) if device.type == "cuda" and not args.no_compile else loss_of
    first, marked, saved, running = step, step, 0.0, torch.zeros((), device=device)
    mark_time = budget.used
    while not (budget.done or (args.steps and step - first >= args.steps)):
        rate = learning_rate(budget.progress, step - first, args.lr)
        for group in optimiser.param_groups:
            group["lr"] = rate
        odd = step % 16 == 15
        clips, ground = others[step // 16 % len(others)] if odd else pool
        index = torch.randint(len(clips), (min(len(clips), 4 if odd else args.batch),), generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = (loss_of if odd else fast)(
                vae, from_bytes(clips[index]), ground[index], args.square, args.decoder_only
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        ema.update()
        running += loss.detach()
        step += 1
        if step % args.every == 0:
            mean = float(running) / (step - marked)
            log.add(
                step=step,
                minutes=round(spent + budget.used, 3),
                loss=mean,
                lr=rate,
                its=(step - marked) / max(1e-9, (budget.used - mark_time) * 60),
            )
            running.zero_()
            marked, mark_time = step, budget.used
            if step % (5 * args.every) == 0 or budget.used - saved > 2:
                ema.swap()
                log.rows[-1]["psnr"] = psnr(vae, check)
                print(f"  full-clip psnr {log.rows[-1]['psnr']:.2f} dB", flush=True)
                if budget.used - saved > 2:
                    export(vae, None if args.decoder_only else check, work / "vae")
                    log.save()
                    saved = budget.used
                ema.swap()
    ema.swap()
    export(vae, None if args.decoder_only else pool[0][:512], work / "vae")
    final = psnr(vae, check)
    log.add(
        step=step, minutes=round(spent + budget.used, 3), psnr=final, psnr_noise=psnr(vae, check, noise=LATENT_NOISE)
    )
    for clips, _ in others:
        print(f"  {tuple(clips.shape[2:])}: {psnr(vae, clips[:32]):.2f} dB", flush=True)
    log.save()
    (work / "vae.done").touch()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder for the weights and the log")
    parser.add_argument("--minutes", type=float, default=8.0, help="wall-clock budget of this command")
    parser.add_argument("--plan", type=float, help="minutes of all commands together (the cosine's length)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--source", default=str(CHECKPOINT), help="exported folder to start from where DIR has none")
    parser.add_argument("--decoder-only", action="store_true", help="with --resume: keep the encoder and its latents")
    parser.add_argument("--square", type=float, default=4.0, help="weight of the squared error beside the absolute one")
    parser.add_argument("--restart", action="store_true", help="with --resume: begin the learning rate's cosine anew")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--clips", type=int, default=6000, help="size of the rendered pool")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=100, help="steps between log rows")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: by the clock only)")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: every code path, no useful weights")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
