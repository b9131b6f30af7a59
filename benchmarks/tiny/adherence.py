"""Share of held-out prompts that the tiny model draws as asked: colour, shape, direction, count, English and Chinese.

    python -m benchmarks.tiny.adherence --prompts 200 [--device cuda] [--model FOLDER] [--steps N] [--guidance G]

Runs plain diffusers.WanPipeline on the folder, reads the decoded frames with `benchmarks.tiny.reader` (which shares
nothing with the training code) and prints Markdown tables. A clip counts as right only if all its objects are, under
the pairing of named and drawn objects that suits it best. The second table splits the defaults by kind of prompt. The
third compares them with guidance 1 and with wrong negative prompts, from the same noise, on prompts about two objects,
since one alone hardly needs guidance: guidance 1 must be clearly worse, or guidance is broken.
"""

from __future__ import annotations

import argparse
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from PIL import Image

from benchmarks.tiny.reader import Seen, judge, read
from serve_app.tiny import CHECKPOINT
from serve_app.tiny.recipe.captions import DEFAULTS, LANGUAGES, Prompt, held_out_prompts

QUESTIONS = ("colour", "shape", "direction", "count")
KINDS = ("one object", "two alike", "two different")
SAME = "default, on the same"


def _read(job: tuple[np.ndarray, list[tuple[str, str, str]]]) -> tuple[dict[str, bool], list[Seen]]:
    torch.set_num_threads(1)
    seen = read(torch.from_numpy(job[0]).float() / 255)
    return judge(seen, [Seen(*t) for t in job[1]]), seen


def _kind(prompt: Prompt) -> str:
    first, *rest = prompt.things
    return KINDS[0] if not rest else KINDS[1] if rest[0] == first else KINDS[2]


def generate(
    pipe: WanPipeline,
    prompts: list[Prompt],
    seeds: list[int],
    args: argparse.Namespace,
    guidance: tuple[float, float],
    negative: str | list[str],
) -> list[np.ndarray]:
    """Return clips, uint8 [T, H, W, 3]; noise is drawn on the CPU."""
    clips: list[np.ndarray] = []
    for start in range(0, len(prompts), args.batch):
        part = prompts[start : start + args.batch]
        wrong = [negative] * len(part) if isinstance(negative, str) else negative[start : start + args.batch]
        out = pipe(
            prompt=[p.text for p in part],
            negative_prompt=wrong,
            height=args.height,
            width=args.width,
            num_frames=args.frames,
            num_inference_steps=args.steps,
            guidance_scale=guidance[0],
            guidance_scale_2=guidance[1],
            output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + args.batch]],
        ).frames
        clips.extend((out.permute(0, 1, 3, 4, 2) * 255).round().byte().cpu().numpy())
    return clips


def picture(clips: list[np.ndarray], prompts: list[Prompt], file: Path, rows: int = 24) -> None:
    """Draw seven frames of each clip, two clips a row; the prompts go beside it as text."""
    strips = [np.concatenate([c[i] for i in np.linspace(0, len(c) - 1, 7).astype(int)], 1) for c in clips[: 2 * rows]]
    pairs = [np.concatenate(strips[i : i + 2], 1) for i in range(0, len(strips) - 1, 2)]
    Image.fromarray(np.concatenate(pairs)).save(file, quality=85)
    file.with_suffix(".txt").write_text("\n".join(p.text for p in prompts[: 2 * rows]), encoding="utf-8")


def _shares(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    return {q: sum(v[q] for v in verdicts) / max(1, len(verdicts)) for q in QUESTIONS}


def _table(results: dict[tuple[str, str], dict[str, float]], columns: list[str]) -> None:
    heads = [(language, name) for language in LANGUAGES for name in columns]
    print("| question | " + " | ".join(f"{language.upper()} {name}" for language, name in heads) + " |")
    print("|---|" + "---|" * len(heads))
    for q in QUESTIONS:
        print(f"| {q} | " + " | ".join(f"{100 * results[head][q]:.1f} %" for head in heads) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=200, help="per language")
    parser.add_argument("--steps", type=int, default=DEFAULTS["num_inference_steps"])
    parser.add_argument("--guidance", type=float, default=DEFAULTS["guidance_scale"])
    parser.add_argument("--guidance-2", type=float, default=DEFAULTS["guidance_scale_2"])
    parser.add_argument("--shift", type=float, help="another flow shift than the folder's")
    parser.add_argument("--negative", default=DEFAULTS["negative_prompt"])
    parser.add_argument("--height", type=int, default=DEFAULTS["height"])
    parser.add_argument("--width", type=int, default=DEFAULTS["width"])
    parser.add_argument("--frames", type=int, default=DEFAULTS["num_frames"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument(
        "--compare", type=int, default=60, help="prompts about two objects for the comparisons; 0: none"
    )
    parser.add_argument("--only", nargs="+", metavar="COLUMN", help="of the columns, by name")
    parser.add_argument("--errors", action="store_true", help="list what was read wrongly")
    parser.add_argument("--picture", type=Path, help="write frames of the default's clips here (JPEG)")
    args = parser.parse_args()

    pipe = WanPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.shift:
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=args.shift)
    guided = (args.guidance, args.guidance_2)
    settings: dict[str, tuple[tuple[float, float], Any]] = {"default": (guided, args.negative)}
    if args.compare:
        settings |= {
            "guidance 1": ((1.0, 1.0), ""),
            "empty negative": (guided, ""),
            "negative = the prompt": (guided, None),
        }
    settings = {name: setting for name, setting in settings.items() if name in (args.only or settings)}
    results: dict[tuple[str, str], dict[str, float]] = {}
    by_kind: dict[str, dict[str, list[dict[str, bool]]]] = {la: {k: [] for k in KINDS} for la in LANGUAGES}
    with ProcessPoolExecutor() as pool:
        for name, (guidance, negative) in settings.items():
            for language in LANGUAGES:
                asked = list(enumerate(held_out_prompts(args.prompts, language), start=args.seed))
                if name != "default":
                    asked = [(seed, p) for seed, p in asked if len(p.things) > 1][: args.compare]
                seeds, prompts = [seed for seed, _ in asked], [p for _, p in asked]
                start = time.monotonic()
                clips = generate(
                    pipe, prompts, seeds, args, guidance, [p.text for p in prompts] if negative is None else negative
                )
                jobs = [(c, [tuple(t) for t in p.things]) for c, p in zip(clips, prompts, strict=True)]
                verdicts = list(pool.map(_read, jobs, chunksize=4))
                results[language, name] = _shares([v for v, _ in verdicts])
                print(f"  {language} {name}: {results[language, name]} ({time.monotonic() - start:.0f} s)", flush=True)
                if name == "default":
                    for p, (v, _) in zip(prompts, verdicts, strict=True):
                        by_kind[language][_kind(p)].append(v)
                    two = [v for p, (v, _) in zip(prompts, verdicts, strict=True) if len(p.things) > 1]
                    results[language, SAME] = _shares(two[: args.compare])
                    if args.errors:
                        for p, (v, seen) in zip(prompts, verdicts, strict=True):
                            if not all(v.values()):
                                print(
                                    "   ",
                                    [q for q in QUESTIONS if not v[q]],
                                    p.text,
                                    "->",
                                    "; ".join(f"{s.colour} {s.shape} {s.motion}" for s in seen),
                                )
                    if args.picture:
                        picture(clips, prompts, args.picture.with_stem(f"{args.picture.stem}_{language}"))
    machine = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    )
    print(
        f"\n{args.prompts} held-out prompts per language, "
        f"{args.width}x{args.height}, {args.frames} frames, {args.steps} steps, "
        f"guidance {guided[0]:g}/{guided[1]:g}, negative {args.negative!r}; {machine}, torch {torch.__version__}\n"
    )
    if "default" in settings:
        _table(results, ["default"])
    print("\n| kind (prompts) | " + " | ".join(f"{la.upper()} {q}" for la in LANGUAGES for q in QUESTIONS) + " |")
    print("|---|" + "---|" * (len(LANGUAGES) * len(QUESTIONS)))
    for kind in KINDS:
        shares = [
            f"{100 * sum(v[q] for v in verdicts) / len(verdicts):.0f} %" if verdicts else "-"
            for verdicts in (by_kind[la][kind] for la in LANGUAGES)
            for q in QUESTIONS
        ]
        sizes = " / ".join(str(len(by_kind[la][kind])) for la in LANGUAGES)
        print(f"| {kind} ({sizes}) | " + " | ".join(shares) + " |")
    if args.compare:
        print(f"\nThe first {args.compare} prompts about two objects, or as many as there are:\n")
        _table(results, [name for name in (SAME, *settings) if name != "default" and ("en", name) in results])


if __name__ == "__main__":
    main()
