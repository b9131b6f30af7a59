"""Train the text encoder and both experts together by flow matching on encoded clips.

    python -m serve_app.tiny.train_experts --minutes 8 --work DIR [--resume] [--plan 15] [--wait]

Needs DIR/vae (train_vae; --wait waits for it, compiling and learning the words meanwhile) or the shipped one.
Writes DIR/state.pt (everything, to resume exactly), the averaged weights in the diffusers layout (fp16:
DIR/transformer, transformer_2, text_encoder, tokenizer) and DIR/experts_log.json. --resume continues from
state.pt, or else from the weights in DIR, or else from the shipped checkpoint. --smoke walks the same path in seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

from serve_app.tiny import CHECKPOINT
from serve_app.tiny.captions import DEFAULTS
from serve_app.tiny.dataset import Data, describe, encode_scenes, make_texts, scenes_for_training
from serve_app.tiny.loop import Budget, Ema, Log, learning_rate, pick_device
from serve_app.tiny.muon import Muon
from serve_app.tiny.text import (
    LENGTH,
    TEXT_CONFIG,
    Reader,
    ShortCrossAttention,
    embed,
    new_text_encoder,
    train_tokenizer,
)

EXPERT: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 8,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_CONFIG["d_model"],
    "freq_dim": 128,
    "ffn_dim": 512,
    "num_layers": 5,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
BOUNDARY = 0.875
DROPOUT = 0.12
# The high-noise expert decides what goes where, which is what captions are about: it gets the larger share of a batch.
HIGH_SHARE = 0.625
MAIN_SIZE = (33, 128, 128)
OTHER_SIZES = ((17, 128, 128), (33, 96, 160), (33, 160, 96), (1, 128, 128), (9, 64, 64), (49, 96, 96), (33, 192, 192))
OTHER_EVERY = 12  # steps between two batches of another size, which run without compiling
FOLDERS = ("transformer", "transformer_2", "text_encoder")


def draw_sigma(n: int, high: bool, device: torch.device) -> Tensor:
    """Noise levels of one expert, [n], spread as the sampler's shifted steps spread them."""
    shift = DEFAULTS["flow_shift"]
    edge = BOUNDARY / (shift - (shift - 1) * BOUNDARY)
    u = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
    s = edge + (1 - edge) * u if high else edge * u
    return shift * s / (1 + (shift - 1) * s)


def expert_loss(model: WanTransformer3DModel, x: Tensor, noise: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity noise - x at x_t = (1 - sigma) x + sigma noise."""
    s = sigma.view(-1, 1, 1, 1, 1)
    out = model(
        hidden_states=(1 - s) * x + s * noise, timestep=1000 * sigma, encoder_hidden_states=words, return_dict=False
    )[0]
    return ((out.float() - (noise - x)) ** 2).mean()


class Trainer:
    """The trained modules, their optimisers and averages."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.work = args, pick_device(args.device), Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        source = next((p for p in (self.work, CHECKPOINT) if (p / "tokenizer").exists()), None)
        if source is None or (args.fresh_tokenizer and source == CHECKPOINT):
            texts = describe(
                scenes_for_training(300 if args.smoke else 8000, torch.Generator().manual_seed(7)), 4, random.Random(7)
            )[0]
            train_tokenizer(texts).save_pretrained(self.work / "tokenizer")
            source = self.work
        self.tokenizer = AutoTokenizer.from_pretrained(source / "tokenizer")
        self.tokenizer.save_pretrained(self.work / "tokenizer")
        self.empty = torch.zeros(LENGTH, dtype=torch.int16, device=self.device)
        self.empty[0] = self.tokenizer.eos_token_id
        config = EXPERT | ({"num_layers": 1, "ffn_dim": 64} if args.smoke else {})
        weights = None
        if args.resume and not (self.work / "state.pt").exists():
            weights = self.work if (self.work / "transformer").exists() else CHECKPOINT
        self.experts: Any  # a ModuleList, whose items type checkers take for plain modules
        if weights is None:
            self.text = new_text_encoder(len(self.tokenizer))
            self.experts = nn.ModuleList(WanTransformer3DModel(**config) for _ in range(2))
            for expert in self.experts:
                nn.init.zeros_(expert.proj_out.weight)
                nn.init.zeros_(expert.proj_out.bias)
        else:
            self.text = UMT5EncoderModel.from_pretrained(weights / "text_encoder", dtype=torch.float32)
            self.experts = nn.ModuleList(
                WanTransformer3DModel.from_pretrained(weights / name, dtype=torch.float32) for name in FOLDERS[:2]
            )
        for expert in self.experts:
            for block in expert.blocks:
                block.attn2.set_processor(ShortCrossAttention())
        self.reader = Reader(TEXT_CONFIG["d_model"])
        for module in (self.text, self.experts, self.reader):
            module.to(self.device).train()
        self.parameters = list(self.text.parameters()) + list(self.experts.parameters())
        matrices = [p for e in self.experts for p in e.blocks.parameters() if p.ndim == 2]
        matrices += [p for p in self.text.encoder.block.parameters() if p.ndim == 2 and min(p.shape) >= 64]
        chosen = {id(p) for p in matrices}
        others = [p for p in (*self.parameters, *self.reader.parameters()) if id(p) not in chosen]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(
            others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=self.device.type == "cuda"
        )
        self.ema = Ema(self.parameters, 0.999)
        self.step, self.spent = 0, 0.0
        rows: list[dict[str, Any]] = []
        if args.resume and (self.work / "experts_log.json").exists():
            rows = json.loads((self.work / "experts_log.json").read_text())
        if args.resume and (self.work / "state.pt").exists():
            self.load(torch.load(self.work / "state.pt", map_location=self.device))
        elif rows:
            self.step, self.spent = rows[-1]["step"], rows[-1]["minutes"]
        self.log = Log(self.work / "experts_log.json", rows)
        self.heads_are_new = weights is not None
        self.warm_from = 0 if args.resume and (self.work / "state.pt").exists() else self.step
        fast = self.device.type == "cuda" and not args.no_compile
        self.fast = torch.compile(expert_loss, dynamic=False) if fast else expert_loss

    def load(self, state: dict[str, Any]) -> None:
        for name in ("text", "experts", "reader", "adam"):
            getattr(self, name).load_state_dict(state[name])
        self.ema.mean, self.ema.updates = state["ema"], state["updates"]
        self.muon.buffers = state["muon"]
        self.step, self.spent = state["step"], state["minutes"]

    def save(self, minutes: float) -> None:
        """State to resume exactly, averaged weights in fp16, log."""
        state = {name: getattr(self, name).state_dict() for name in ("text", "experts", "reader", "adam")}
        state |= {
            "ema": self.ema.mean,
            "updates": self.ema.updates,
            "muon": self.muon.buffers,
            "step": self.step,
            "minutes": minutes,
        }
        torch.save(state, self.work / "state.tmp")
        (self.work / "state.tmp").rename(self.work / "state.pt")
        self.ema.swap()
        for name, module in zip(FOLDERS, (*self.experts, self.text), strict=True):
            # A copy is converted: the live weights stay fp32.
            copy = type(module)(module.config) if name == "text_encoder" else type(module).from_config(module.config)
            copy.load_state_dict(module.state_dict())
            copy.half().save_pretrained(self.work / name)
        self.ema.swap()
        self.log.save()

    def losses(self, data: Data, n: int, compiled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(high-noise, low-noise, words' loss, words' share right) on one batch of n clips."""
        x, ids, told = data.batch(n)
        cut = round(n * HIGH_SHARE / 8) * 8
        drop = torch.rand(n, device=self.device) < DROPOUT
        ids = torch.where(drop[:, None], self.empty, ids)
        told = told.masked_fill(drop[:, None], -1)
        words = embed(self.text, ids)
        # Heads that are new beside trained weights must not pull the encoder about while they find their answers.
        aux, right = self.reader(words.detach() if self.heads_are_new else words, ids, told)
        noise = torch.randn_like(x)
        run = self.fast if compiled else expert_loss
        parts = []
        for i, expert in enumerate(self.experts):
            part = slice(0, cut) if i == 0 else slice(cut, n)
            sigma = draw_sigma(len(x[part]), i == 0, self.device)
            parts.append(run(expert, x[part], noise[part], sigma, words[part]))
        return parts[0], parts[1], aux, right

    def update(self, loss: Tensor, rate: float) -> None:
        loss.backward()
        every = [*self.parameters, *self.reader.parameters()]
        torch.nn.utils.clip_grad_norm_([p for p in every if p.grad is not None], 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.muon.lr = rate * self.args.muon_ratio
        self.muon.step()
        for p in every:
            p.grad = None

    def learn_words(self, ids: Tensor, told: Tensor, minutes: float) -> None:
        """Teach the text encoder alone, before there are latents."""
        budget, n = Budget(minutes), min(1024, len(ids))
        flat_ids, flat_told = ids.flatten(0, 1), told.flatten(0, 1)
        optimiser = torch.optim.AdamW([*self.text.parameters(), *self.reader.parameters()], lr=2e-3, betas=(0.9, 0.98))
        step = 0
        while not budget.done and step < (4 if self.args.smoke else 2500):
            pick = torch.randint(len(flat_ids), (n,), device=self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss, right = self.reader(embed(self.text, flat_ids[pick]), flat_ids[pick], flat_told[pick])
            optimiser.param_groups[0]["lr"] = learning_rate(budget.progress, step, 2e-3)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*self.text.parameters()], 1.0)
            optimiser.step()
            step += 1
            if step % 200 == 0:
                print(f"  words: step {step} loss {loss.item():.3f} right {right.item():.4f}", flush=True)
        self.ema = Ema(self.parameters, self.ema.decay)

    def warm_up(self, n: int) -> None:
        """Compile on random numbers of the main size."""
        x = torch.randn(n, 16, (MAIN_SIZE[0] - 1) // 4 + 1, MAIN_SIZE[1] // 8, MAIN_SIZE[2] // 8, device=self.device)
        ids = self.empty.expand(n, 1, LENGTH)
        told = torch.zeros(n, 1, 8, dtype=torch.long, device=self.device)
        with torch.autocast("cuda", torch.bfloat16):
            high, low, aux, _ = self.losses(Data(x, ids, told), n, True)
        (high + low + aux).backward()
        for p in (*self.parameters, *self.reader.parameters()):
            p.grad = None
        torch.cuda.synchronize()


def train(args: argparse.Namespace) -> None:
    budget = Budget(args.minutes)
    t = Trainer(args)
    budget.spent, budget.plan = t.spent, max(args.plan or 0.0, t.spent + args.minutes)
    device = t.device
    size = (5, 32, 32) if args.smoke else MAIN_SIZE
    print(
        f"{sum(p.numel() for p in t.experts[0].parameters())} parameters per expert, "
        f"{sum(p.numel() for p in t.text.parameters())} text encoder, {len(t.tokenizer)} tokens",
        flush=True,
    )
    # Another seed per command: a resumed run sees new clips.
    seed = args.seed + t.step
    generator = torch.Generator().manual_seed(seed)
    scenes = scenes_for_training(16 if args.smoke else args.clips, generator, args.two)
    ids, told = make_texts(scenes, t.tokenizer, args.captions, seed, device)
    print(f"captions ready after {budget.used * 60:.0f} s", flush=True)
    if t.step == 0 and args.text_minutes:
        t.learn_words(ids, told, args.text_minutes)
    if t.fast is not expert_loss:
        t.warm_up(args.batch)
        print(f"compiled after {budget.used * 60:.0f} s", flush=True)
    while args.wait and not (t.work / "vae.done").exists():
        time.sleep(0.5)
    source = t.work / "vae" if (t.work / "vae").exists() else CHECKPOINT / "vae"
    vae = AutoencoderKLWan.from_pretrained(source, dtype=torch.float32).to(device).eval()
    data = Data(encode_scenes(vae, scenes, size, device), ids, told)
    others = []
    for other in ((5, 32, 48),) if args.smoke else OTHER_SIZES:
        few = scenes_for_training(8 if args.smoke else args.clips // 40, generator, args.two)
        others.append(Data(encode_scenes(vae, few, other, device), *make_texts(few, t.tokenizer, 4, seed + 1, device)))
    print(
        f"{len(data.latents)} clips encoded after {budget.used * 60:.0f} s",
        flush=True,
    )
    begin = t.step
    # --restart begins the cosine here, after the preparations.
    schedule = Budget(args.minutes - budget.used) if args.restart else budget
    marked, mark_time, saved = t.step, budget.used, budget.used
    running = torch.zeros(4, device=device)
    while not (budget.done or (args.steps and t.step - begin >= args.steps)):
        odd = t.step % OTHER_EVERY == OTHER_EVERY - 1
        source_data = others[t.step // OTHER_EVERY % len(others)] if odd else data
        n = min(len(source_data.latents), 48 if odd else args.batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts = t.losses(source_data, n, not odd)
        t.update(
            parts[0] + parts[1] + 0.1 * parts[2], learning_rate(schedule.progress, t.step - t.warm_from, args.lr, 200)
        )
        t.ema.update()
        t.step += 1
        if not odd:
            running += torch.stack([p.detach() for p in parts])
        if t.step % args.every == 0:
            mean = (running / max(1, t.step - marked - (t.step - marked) // OTHER_EVERY)).tolist()
            t.log.add(
                step=t.step,
                minutes=round(t.spent + budget.used, 3),
                high=mean[0],
                low=mean[1],
                words=mean[2],
                right=mean[3],
                lr=t.adam.param_groups[0]["lr"],
                its=(t.step - marked) / max(1e-9, (budget.used - mark_time) * 60),
            )
            running.zero_()
            marked, mark_time = t.step, budget.used
            if budget.used - saved > 3:
                t.save(t.spent + budget.used)
                saved = budget.used
    t.save(t.spent + budget.used)
    print(f"saved at step {t.step} after {budget.used:.2f} min", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder for the weights, the state and the log")
    parser.add_argument("--minutes", type=float, default=8.0, help="wall-clock budget of this command")
    parser.add_argument("--plan", type=float, help="minutes of all commands together (the cosine's length)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--wait", action="store_true", help="wait for a train_vae that runs beside this command")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=256, help="clips per step, both experts together")
    parser.add_argument("--clips", type=int, default=40000)
    parser.add_argument("--captions", type=int, default=6, help="captions drawn per clip")
    parser.add_argument("--two", type=float, default=0.5, help="share of clips with two objects")
    parser.add_argument("--restart", action="store_true", help="with --resume: begin the learning rate's cosine anew")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="AdamW's peak; Muon's is this times --muon-ratio")
    parser.add_argument("--muon-ratio", type=float, default=1.5)
    parser.add_argument("--text-minutes", type=float, default=0.7, help="for learning the words first, at step 0")
    parser.add_argument("--every", type=int, default=100, help="steps between log rows")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: by the clock only)")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--fresh-tokenizer", action="store_true", help="do not take the shipped tokenizer")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: every code path, no useful weights")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
