"""Assemble the checkpoint folder from the files of the training commands, and draw their loss curves.

python -m serve_app.tiny.recipe.export --work DIR [--out FOLDER] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from serve_app.tiny import CHECKPOINT
from serve_app.tiny.recipe.captions import DEFAULTS
from serve_app.tiny.recipe.experts import BOUNDARY

LIMIT = 16 * 2**20  # bytes: the package ships the folder


def export(work: Path, out: Path) -> int:
    """Write the diffusers layout to `out`, which is replaced as a whole, and return its size in bytes.

    Raises:
        ValueError: the folder would be larger than LIMIT. `out` stays as it was then.
    """
    half = {"dtype": torch.float16}
    pipe = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(work / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(work / "text_encoder", dtype=torch.float16),
        # All weights are stored as fp16, also those that diffusers would load as fp32 beside fp16 ones.
        transformer=WanTransformer3DModel.from_pretrained(work / "transformer").half(),
        transformer_2=WanTransformer3DModel.from_pretrained(work / "transformer_2").half(),
        vae=AutoencoderKLWan.from_pretrained(work / "vae", **half),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            flow_shift=DEFAULTS["flow_shift"],
        ),
        boundary_ratio=BOUNDARY,
    )
    fresh = work / "checkpoint.new"
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh)
    size = sum(p.stat().st_size for p in fresh.rglob("*") if p.is_file())
    if size > LIMIT:
        raise ValueError(f"checkpoint has {size} bytes, at most {LIMIT} are allowed")
    for path in fresh.glob("*/config.json"):  # `_name_or_path` names the folder of before
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in fresh.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(fresh, out)
    return size


def plot(work: Path, file: Path) -> None:
    """Draw the loss curves of the training parts that `work` has a log of, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def rows(name: str) -> list[dict[str, Any]]:
        path = work / f"{name}_log.json"
        return json.loads(path.read_text()) if path.exists() else []

    quality, experts = [row for row in rows("vae") if "psnr" in row], rows("experts")
    parts = [part for part in (quality, experts) if part]
    figure, places = plt.subplots(1, len(parts), figsize=(4.5 * len(parts), 3), layout="constrained", squeeze=False)
    axes = iter(places[0])
    if quality:
        axis = next(axes)
        axis.plot([row["step"] for row in quality], [row["psnr"] for row in quality])
        axis.set(title="autoencoder, full clips", xlabel="step", ylabel="PSNR, dB")
    if experts:
        axis = next(axes)
        for key, label in (("high", "high-noise expert"), ("low", "low-noise expert")):
            axis.plot([row["step"] for row in experts], [row[key] for row in experts], label=label)
        axis.set(title="flow matching loss", xlabel="step", yscale="log")
        axis.legend()
    figure.savefig(file, dpi=80)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    print(f"{args.out}: {export(args.work, args.out)} bytes")
    if args.plot:
        plot(args.work, args.plot)


if __name__ == "__main__":
    main()
