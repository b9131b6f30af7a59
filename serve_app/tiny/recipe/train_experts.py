"""Train the text encoder and both experts together by flow matching on encoded clips.

    python -m serve_app.tiny.recipe.train_experts --minutes 8 --work DIR [--resume] [--plan 15] [--wait]

Needs DIR/vae (train_vae; --wait waits for it, compiling and learning the words meanwhile) or that of --source. Writes
DIR/state.pt (everything, to resume exactly), the averaged weights in the diffusers layout (fp16: DIR/transformer,
transformer_2, text_encoder, tokenizer), DIR/experts_log.json, and DIR/latents.pt (encoded clips: commands with the
same --clips, --two, --alike and --seed share them). --resume continues from state.pt, or else from the weights in DIR,
or else from those of --source, by default the shipped checkpoint; without state.pt the optimisers start anew.
A changed autoencoder changes the latents that the experts know: train it first. --smoke walks the same path in
seconds.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor

from serve_app.tiny import CHECKPOINT
from serve_app.tiny.recipe.dataset import Data, encoded, make_texts, scenes_for_training
from serve_app.tiny.recipe.loop import Budget, learning_rate
from serve_app.tiny.recipe.trainer import Trainer

MAIN_SIZE = (33, 128, 128)
OTHER_SIZES = ((17, 128, 128), (33, 96, 160), (33, 160, 96), (1, 128, 128), (9, 64, 64), (49, 96, 96), (33, 192, 192))
OTHER_EVERY = 16  # steps between two batches of another size, which run without compiling


def prepare(t: Trainer, budget: Budget) -> tuple[Data, list[Data]]:
    """Return the clips of the main size and of the others, with captions. Compiles and teaches words meanwhile."""
    args = t.args

    def told(what: str) -> None:
        print(f"{what} after {budget.used * 60:.0f} s", flush=True)

    sizes = [(5, 32, 32), (5, 32, 48)] if args.smoke else [MAIN_SIZE, *OTHER_SIZES]
    counts = [16, 8] if args.smoke else [args.clips] + [args.clips // 40] * len(OTHER_SIZES)
    generator = torch.Generator().manual_seed(args.seed)
    scenes = [scenes_for_training(n, generator, args.two, args.alike) for n in counts]
    # Another seed per command: a resumed run reads new captions of the same clips.
    seeds = random.Random(f"{args.seed} {t.step}")
    texts: list[tuple[Tensor, Tensor]] = [
        make_texts(s, t.tokenizer, args.captions if i == 0 else 4, seeds.randrange(2**31), t.device)
        for i, s in enumerate(scenes)
    ]
    told("captions ready")
    if t.heads_are_new:
        t.learn_words(*texts[0], minutes=0.3, steps=4 if args.smoke else 400, heads_only=True)
        told("heads ready")
    elif t.step == 0 and args.text_minutes:
        t.learn_words(*texts[0], minutes=args.text_minutes, steps=4 if args.smoke else 2500, heads_only=False)
        told("words learnt")
    if t.compiled:
        t.warm_up(args.batch, ((sizes[0][0] - 1) // 4 + 1, sizes[0][1] // 8, sizes[0][2] // 8))
        told("compiled")
    while args.wait and not (t.work / "vae.done").exists():
        if budget.done:
            raise TimeoutError(f"--wait: {t.work / 'vae.done'} did not appear within --minutes {args.minutes}")
        time.sleep(0.5)
    if not (t.work / "vae").exists():
        # Kept beside the weights that are trained on its latents, for the export.
        shutil.copytree(Path(args.source) / "vae", t.work / "vae")
    latents, kept = encoded(t.work / "latents.pt", t.work / "vae", scenes, sizes, t.device)
    told(f"{len(latents[0])} clips {'read' if kept else 'encoded'}")
    data = [Data(z, *text) for z, text in zip(latents, texts, strict=True)]
    return data[0], data[1:]


def train(args: argparse.Namespace) -> None:
    """Train until the minutes are used up, and save."""
    budget = Budget(args.minutes)
    t = Trainer(args)
    device = t.device
    print(
        f"{sum(p.numel() for p in t.experts[0].parameters())} parameters per expert, "
        f"{sum(p.numel() for p in t.text.parameters())} text encoder, {len(t.tokenizer)} tokens",
        flush=True,
    )
    data, others = prepare(t, budget)
    torch.manual_seed(args.seed + t.step)  # a resumed command must not draw the noise of the earlier one again
    begin = t.step
    # The cosine follows the minutes of training proper: how long the preparations take is not known beforehand.
    schedule = Budget(max(0.01, args.minutes - budget.used), 0.0 if args.restart else t.spent, args.plan)
    marked, mark_time, saved = t.step, 0.0, 0.0
    running, plain = torch.zeros(4, device=device), 0
    while not (budget.done or (args.steps and t.step - begin >= args.steps)):
        odd = t.step % OTHER_EVERY == OTHER_EVERY - 1
        source = others[t.step // OTHER_EVERY % len(others)] if odd else data
        n = min(len(source.latents), 48 if odd else args.batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts = t.losses(source, n, not odd)
        rate = learning_rate(schedule.progress, t.step - t.warm_from, args.lr, 200)
        t.update(parts[0] + parts[1] + 0.1 * parts[2], rate)
        if not odd:
            running += torch.stack([p.detach() for p in parts])
            plain += 1
        if t.step % args.every == 0:
            mean = (running / max(1, plain)).tolist()
            t.log.add(
                step=t.step,
                minutes=round(t.spent + schedule.used, 3),
                high=mean[0],
                low=mean[1],
                words=mean[2],
                right=mean[3],
                lr=rate,
                its=(t.step - marked) / max(1e-9, (schedule.used - mark_time) * 60),
            )
            running.zero_()
            marked, mark_time, plain = t.step, schedule.used, 0
            if schedule.used - saved > 3:
                t.save(t.spent + schedule.used)
                saved = schedule.used
    t.save(t.spent + schedule.used)
    print(f"saved at step {t.step} after {budget.used:.2f} min", flush=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder for the weights, the state and the log")
    parser.add_argument("--minutes", type=float, default=8.0, help="wall-clock budget of this command")
    parser.add_argument(
        "--plan", type=float, help="the cosine's length: minutes of training in all commands, without preparations"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--source", default=str(CHECKPOINT), help="exported folder to start from where DIR has nothing")
    parser.add_argument("--wait", action="store_true", help="wait for a train_vae that runs beside this command")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=256, help="clips per step, both experts together")
    # The high-noise expert decides what goes where, which is what captions are about: it gets the larger share.
    parser.add_argument(
        "--high-share", type=float, default=0.625, help="of a batch, for the high-noise expert; 0.5 compiles faster"
    )
    parser.add_argument("--clips", type=int, default=40000)
    parser.add_argument("--captions", type=int, default=6, help="captions drawn per clip")
    parser.add_argument("--two", type=float, default=0.6, help="share of clips with two objects")
    parser.add_argument("--alike", type=float, default=0.2, help="share of these with objects alike in everything")
    parser.add_argument("--restart", action="store_true", help="with --resume: begin the learning rate's cosine anew")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="AdamW's peak; Muon's is this times --muon-ratio")
    parser.add_argument("--muon-ratio", type=float, default=1.5)
    parser.add_argument("--text-minutes", type=float, default=0.7, help="for learning the words first, from scratch")
    parser.add_argument("--every", type=int, default=100, help="steps between log rows")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: by the clock only)")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--fresh-tokenizer", action="store_true", help="do not take the shipped tokenizer")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: every code path, no useful weights")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
