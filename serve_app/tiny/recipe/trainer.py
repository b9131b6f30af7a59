"""The trained modules, their optimisers and averages, and their files.

Knows nothing of clips or the clock of a command (train_experts.py).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5EncoderModel

from serve_app.tiny import CHECKPOINT
from serve_app.tiny.recipe.dataset import Data, describe, scenes_for_training
from serve_app.tiny.recipe.experts import FOLDERS, draw_sigma, expert_loss, load_experts, new_experts, quicken
from serve_app.tiny.recipe.loop import Budget, Ema, Log, learning_rate, pick_device
from serve_app.tiny.recipe.muon import Muon
from serve_app.tiny.recipe.text import LENGTH, Reader, embed, new_text_encoder, train_tokenizer

DROPOUT = 0.12


def read_words(text: UMT5EncoderModel, reader: Reader, ids: Tensor, told: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings, auxiliary loss and share of right answers of captions. One function, to be compiled as one."""
    words = embed(text, ids)
    return words, *reader(words, ids, told)


def _tokenizer(args: argparse.Namespace, work: Path, weights: Path | None) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the work folder, of the weights, the shipped one, or a new one, and save it in `work`."""
    places = [work, *([weights] if weights else [] if args.fresh_tokenizer else [CHECKPOINT])]
    source = next((p for p in places if (p / "tokenizer").exists()), None)
    if source is None:
        scenes = scenes_for_training(300 if args.smoke else 8000, torch.Generator().manual_seed(7))
        train_tokenizer(describe(scenes, 4, random.Random(7))[0]).save_pretrained(work / "tokenizer")
        source = work
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(source / "tokenizer")
    tokenizer.save_pretrained(work / "tokenizer")
    return tokenizer


class Trainer:
    """The trained modules with optimisers, averages, step and log: all that a checkpoint of the training holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Make or load everything.

        Raises:
            FileNotFoundError: --resume finds weights neither in the work folder nor in --source.
        """
        self.args, self.device, self.work = args, pick_device(args.device), Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        weights: Path | None = None
        if args.resume:
            weights = self.work if (self.work / FOLDERS[0]).exists() else Path(args.source)
            if not (weights / FOLDERS[0]).exists():
                raise FileNotFoundError(f"--source has value {args.source}, expected a folder that holds {FOLDERS[0]}/")
        self.tokenizer = _tokenizer(args, self.work, weights)
        self.empty = torch.zeros(LENGTH, dtype=torch.int16, device=self.device)
        self.empty[0] = self.tokenizer.eos_token_id
        self.experts: Any  # a ModuleList, whose items type checkers take for plain modules
        if weights is None:
            self.text = new_text_encoder(len(self.tokenizer))
            self.experts = new_experts(**({"num_layers": 1, "ffn_dim": 64} if args.smoke else {}))
        else:
            self.text = UMT5EncoderModel.from_pretrained(weights / "text_encoder", dtype=torch.float32)
            self.experts = load_experts(weights)
        for expert in self.experts:
            quicken(expert)
        self.reader = Reader(self.text.config.d_model)
        for module in (self.text, self.experts, self.reader):
            module.to(self.device).train()
        self.parameters = list(self.text.parameters()) + list(self.experts.parameters())
        self.every = [*self.parameters, *self.reader.parameters()]
        matrices = [p for e in self.experts for p in e.blocks.parameters() if p.ndim == 2]
        matrices += [p for p in self.text.encoder.block.parameters() if p.ndim == 2 and min(p.shape) >= 64]
        chosen = {id(p) for p in matrices}
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(
            [p for p in self.every if id(p) not in chosen],
            lr=args.lr,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=self.device.type == "cuda",
        )
        self.ema = Ema(self.parameters, 0.999)
        self.step, self.spent = 0, 0.0
        state = self.work / "state.pt"
        # Without a state the reader's heads are new; beside trained weights they must learn before they teach.
        self.heads_are_new = weights is not None and not (args.resume and state.exists())
        rows: list[dict[str, Any]] = []
        if args.resume and (self.work / "experts_log.json").exists():
            rows = json.loads((self.work / "experts_log.json").read_text())
        if args.resume and state.exists():
            self.load(torch.load(state, map_location=self.device))
        elif rows:
            self.step, self.spent = rows[-1]["step"], rows[-1]["minutes"]
        self.log = Log(self.work / "experts_log.json", rows)
        self.warm_from = 0 if args.resume and state.exists() else self.step
        self.compiled = self.device.type == "cuda" and not args.no_compile
        self.fast = torch.compile(expert_loss, dynamic=False) if self.compiled else expert_loss
        self.fast_words = torch.compile(read_words, dynamic=False) if self.compiled else read_words

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state that `save` has written."""
        for name in ("text", "experts", "reader", "adam"):
            getattr(self, name).load_state_dict(state[name])
        self.ema.mean, self.ema.updates = state["ema"], state["updates"]
        self.muon.buffers = state["muon"]
        self.step, self.spent = state["step"], state["minutes"]

    def save(self, minutes: float) -> None:
        """Write the state for an exact resume, the averaged weights in fp16, and the log."""
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
        for name, module in zip((*FOLDERS, "text_encoder"), (*self.experts, self.text), strict=True):
            # A copy is converted: the live weights stay fp32.
            copy = type(module)(module.config) if name == "text_encoder" else type(module).from_config(module.config)
            copy.load_state_dict(module.state_dict())
            copy.half().save_pretrained(self.work / name)
        self.ema.swap()
        self.log.save()

    def losses(self, data: Data, n: int, compiled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the losses of high-noise expert, low-noise expert and words, and the words' share of right answers.

        They are those of one batch of n clips.
        """
        x, ids, told = data.batch(n)
        cut = round(n * self.args.high_share / 8) * 8
        drop = torch.rand(n, device=self.device) < DROPOUT
        ids = torch.where(drop[:, None], self.empty, ids)
        told = told.masked_fill(drop[:, None], -1)
        words, aux, right = (self.fast_words if compiled else read_words)(self.text, self.reader, ids, told)
        noise = torch.randn_like(x)
        run = self.fast if compiled else expert_loss
        parts = []
        for i, expert in enumerate(self.experts):
            part = slice(0, cut) if i == 0 else slice(cut, n)
            sigma = draw_sigma(len(x[part]), i == 0, self.device)
            parts.append(run(expert, x[part], noise[part], sigma, words[part]))
        return parts[0], parts[1], aux, right

    def update(self, loss: Tensor, rate: float) -> None:
        """Do one step of both optimisers, and update the averages."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.every if p.grad is not None], 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.muon.lr = rate * self.args.muon_ratio
        self.muon.step()
        self.ema.update()
        self.step += 1
        for p in self.every:
            p.grad = None

    def learn_words(self, ids: Tensor, told: Tensor, minutes: float, steps: int, heads_only: bool) -> None:
        """Train the text encoder with the auxiliary heads, before there are latents; or the heads alone."""
        budget, n = Budget(minutes), min(1024, len(ids))
        flat_ids, flat_told = ids.flatten(0, 1), told.flatten(0, 1)
        taught = [*self.reader.parameters(), *([] if heads_only else self.text.parameters())]
        optimiser = torch.optim.AdamW(taught, lr=2e-3, betas=(0.9, 0.98))
        step = 0
        while not budget.done and step < steps:
            pick = torch.randint(len(flat_ids), (n,), device=self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                with torch.set_grad_enabled(not heads_only):
                    words = embed(self.text, flat_ids[pick])
                loss, right = self.reader(words, flat_ids[pick], flat_told[pick])
            optimiser.param_groups[0]["lr"] = learning_rate(budget.progress, step, 2e-3)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(taught, 1.0)
            optimiser.step()
            step += 1
            if step % 200 == 0:
                print(f"  words: step {step} loss {loss.detach().item():.3f} right {right.item():.4f}", flush=True)
        if not heads_only:
            self.ema = Ema(self.parameters, self.ema.decay)

    def warm_up(self, n: int, latents: tuple[int, int, int]) -> None:
        """Compile the step on random numbers: n clips whose `latents` are (frames, height, width)."""
        x = torch.randn(n, 16, *latents, device=self.device)
        told = torch.zeros(n, 1, 8, dtype=torch.long, device=self.device)
        with torch.autocast("cuda", torch.bfloat16):
            high, low, aux, _ = self.losses(Data(x, self.empty.expand(n, 1, LENGTH), told), n, True)
        (high + low + aux).backward()
        for p in self.every:
            p.grad = None
        torch.cuda.synchronize()
