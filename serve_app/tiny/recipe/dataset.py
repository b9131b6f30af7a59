"""Latents of rendered clips with pre-tokenised captions, all on one device.

Clips are drawn and encoded once, and kept in a file for later commands. Every training step then draws one of a clip's
captions at random.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from serve_app.tiny.recipe import fullseq
from serve_app.tiny.recipe.captions import LANGUAGES, caption, held_out, names, poor_caption
from serve_app.tiny.recipe.shapes import BACKGROUNDS, Scenes, degrade, random_scenes, render
from serve_app.tiny.recipe.text import token_ids

POOR_SHARE = 0.04


@dataclass
class Data:
    """Clips with K captions each.

    Attributes:
        latents: normalised, [N, 16, t, h, w], bfloat16 on CUDA.
        ids: tokens of the captions, int16 [N, K, LENGTH].
        targets: what each caption tells, int64 [N, K, 8].
    """

    latents: Tensor
    ids: Tensor
    targets: Tensor

    def batch(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return latents (float32), ids and targets of n random clips, with one caption of each."""
        device = self.latents.device
        clip = torch.randint(len(self.latents), (n,), device=device)
        which = torch.randint(self.ids.shape[1], (n,), device=device)
        return self.latents[clip].float(), self.ids[clip, which], self.targets[clip, which]


def describe(scenes: Scenes, per_clip: int, rng: random.Random) -> tuple[list[str], Tensor]:
    """Return `per_clip` captions of each scene, languages in turn, and what each tells.

    What a caption tells is a row of int64 [N, per_clip, 8]; 0 means that it is not told.

    Objects are told in the order of their lanes: left before right, upper before lower. Their starting points would mix
    up lanes if both move sideways. With a random order nothing in a caption would say which object goes where, and the
    model could only average both.
    """
    texts: list[str] = []
    told: list[list[int]] = []
    grounds = list(BACKGROUNDS)
    rows = zip(
        scenes.count.tolist(),
        scenes.colour.tolist(),
        scenes.shape.tolist(),
        scenes.motion.tolist(),
        scenes.background.tolist(),
        scenes.fade.tolist(),
        strict=True,
    )
    for count, colour, shape, motion, ground, fade in rows:
        for k in range(per_clip):
            language = LANGUAGES[k % 2]
            things = [names(colour[i], shape[i], motion[i]) for i in range(count)]
            open_ground = rng.random() < 0.2
            text = caption(things, None if open_ground else grounds[ground], language, "train", rng)
            answer = [v for i in range(count) for v in (colour[i] + 1, shape[i] + 1, motion[i] + 1)]
            # Patterns may leave the background out by themselves; -1 keeps the auxiliary heads out of that doubt.
            answer = [*[*answer, 0, 0, 0][:6], 0 if open_ground else ground + 1, count]
            if fade > 0:
                text = poor_caption(text, language, rng)
                answer = [-1] * 8
            texts.append(text)
            told.append(answer)
    return texts, torch.tensor(told).reshape(len(scenes), per_clip, 8)


def scenes_for_training(n: int, generator: torch.Generator, two: float = 0.6, alike: float = 0.2) -> Scenes:
    """Random scenes without the held-out triples; the last POOR_SHARE of them degraded.

    By default 40 % hold one object, 12 % two alike and 48 % two that differ: these need the most practice.
    """
    scenes = random_scenes(n, generator, two, held_out(), alike)
    poor = max(1, int(n * POOR_SHARE))
    tail = degrade(scenes.pick(slice(n - poor, n)), generator)
    scenes.blur[n - poor :], scenes.fade[n - poor :] = tail.blur, tail.fade
    return scenes


@torch.no_grad()
def encode_scenes(vae: AutoencoderKLWan, scenes: Scenes, size: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return the normalised latents of scenes at a size (frames, height, width)."""
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    chunk = max(1, min(len(scenes), 2**25 // (size[0] * size[1] * size[2])))
    out = []
    for start in range(0, len(scenes), chunk):
        clip = render(scenes.pick(slice(start, start + chunk)).to(device), *size)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z = fullseq.encode(vae, clip)
        out.append(((z.float() - mean) / std).to(torch.bfloat16 if device.type == "cuda" else torch.float32))
    return torch.cat(out)


def make_texts(
    scenes: Scenes, tokenizer: PreTrainedTokenizerFast, per_clip: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the tokens of `per_clip` captions of each scene, and what they tell, on `device`."""
    texts, told = describe(scenes, per_clip, random.Random(seed))
    return token_ids(tokenizer, texts).reshape(len(scenes), per_clip, -1).to(device), told.to(device)


def encoded(
    file: Path, vae_folder: Path, scenes: list[Scenes], sizes: list[tuple[int, int, int]], device: torch.device
) -> tuple[list[Tensor], bool]:
    """Return the latents of each lot of scenes at its size, and True if they were read from `file`.

    The file is read only if it holds the same scenes, sizes and weights of the autoencoder; otherwise it is replaced.
    """
    digest = hashlib.sha256(repr(sizes).encode())
    for path in sorted(vae_folder.iterdir()):
        digest.update(path.read_bytes())
    for lot in scenes:
        for value in asdict(lot).values():
            digest.update(value.numpy().tobytes())
    key = digest.hexdigest()
    if file.exists():
        kept = torch.load(file, mmap=True)
        if kept["key"] == key:
            return [z.to(device) for z in kept["latents"]], True
    vae = AutoencoderKLWan.from_pretrained(vae_folder, dtype=torch.float32).to(device).eval()
    latents = [encode_scenes(vae, lot, size, device) for lot, size in zip(scenes, sizes, strict=True)]
    fresh = file.with_suffix(".tmp")
    torch.save({"key": key, "latents": [z.cpu() for z in latents]}, fresh)
    fresh.rename(file)
    return latents, False
