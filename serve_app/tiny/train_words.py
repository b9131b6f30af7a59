"""Teach the text encoder to pass over words that only look like directions, without touching the experts.

    python -m serve_app.tiny.train_words --minutes 4 --work DIR

Chinese uses the characters of the directions everywhere ("in this light" ends in the character for "down"), and
a model that saw them only as directions obeys them anywhere. The encoder is its own teacher: a caption keeps its
embeddings when such a phrase is put before or after it, and the phrase's own tokens become what a comma is, which
the experts have learned to ignore. Runs on a CPU. Continues DIR/text_encoder, or the shipped one, and writes
DIR/text_encoder (fp16).
"""

from __future__ import annotations

import argparse
import copy
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, UMT5EncoderModel

from serve_app.tiny import CHECKPOINT
from serve_app.tiny.dataset import describe, scenes_for_training
from serve_app.tiny.loop import Budget, learning_rate
from serve_app.tiny.text import LENGTH

# But for one verb, none of these is a part of the benchmark's held-out patterns (tests/tiny/test_text.py).
PHRASES = {
    "zh": (
        "在柔和的灯光下",
        "在这种情况下",
        "在阳光下",
        "在夜空下",
        "请看下面的内容",
        "接下来",
        "如下所示",
        "在镜头下",
        "树下",
        "桌上",
        "在屏幕上",
        "在画布上",
        "在纸上",
        "上面说的",
        "以上内容",
        "如上",
        "晚上",
        "大家好",
        "大约两秒",
        "小朋友喜欢",
        "左右",
        "右边什么也没有",
        "左边空着",
        "从前",
        "能够",
        "视频中",
        "看见",
        "可见",
        "全部",
        "我要看",
        "我喜欢",
        "生成",
        "制作",
        "给我",
        "帮我",
        "一下",
        "请稍等一下",
        "动态效果",
        "高清",
        "非常好看",
        "正在",
        "时",
        "为主",
        "作为",
        "在其中",
        "里面",
    ),
    "en": (
        "right now",
        "all right",
        "what is left",
        "look up close",
        "down here",
        "made up of",
        "a large one",
        "a small file",
        "we watch",
        "you see",
        "it keeps",
        "can be seen",
        "in front of us",
        "as it goes on",
        "beautiful",
        "in high quality",
        "for children",
        "in a row",
        "sit down please",
        "come on up",
    ),
}


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    work = Path(args.work)
    source = work if (work / "text_encoder").exists() else CHECKPOINT
    tokenizer = AutoTokenizer.from_pretrained(source / "tokenizer")
    student = UMT5EncoderModel.from_pretrained(source / "text_encoder", dtype=torch.float32).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    scenes = scenes_for_training(64 if args.smoke else 3000, torch.Generator().manual_seed(args.seed))
    texts = describe(scenes, 2, rng)[0]
    comma = {
        "zh": tokenizer("，", add_special_tokens=False).input_ids,
        "en": tokenizer(",", add_special_tokens=False).input_ids,
    }
    extra = {
        k: [tokenizer((" " if k == "en" else "") + p, add_special_tokens=False).input_ids for p in v]
        for k, v in PHRASES.items()
    }
    optimiser = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    budget, step = Budget(args.minutes), 0
    while not (budget.done or (args.steps and step >= args.steps)):
        plain = torch.zeros(args.batch, LENGTH, dtype=torch.long)
        mixed = torch.zeros(args.batch, LENGTH, dtype=torch.long)
        # For each token of `mixed`: the token of `plain` whose embedding it should have.
        origin = torch.full((args.batch, LENGTH), -1)
        for row in range(args.batch):
            k = rng.randrange(len(texts))
            language = ("en", "zh")[k % 2]
            words = tokenizer(texts[k], add_special_tokens=False).input_ids[:34]
            before = rng.choice(extra[language])[:12] if rng.random() < 0.5 else []
            after = rng.choice(extra[language])[:12] if rng.random() < 0.5 else []
            # The teacher reads the caption with one comma, whose embedding the added words take.
            base = words + comma[language] + [1]
            full = before + words + comma[language] + after + [1]
            spot = len(words)
            where = [spot] * len(before) + list(range(len(words))) + [spot] + [spot] * len(after) + [len(base) - 1]
            plain[row, : len(base)] = torch.tensor(base)
            mixed[row, : len(full)] = torch.tensor(full)
            origin[row, : len(where)] = torch.tensor(where)
        with torch.no_grad():
            target = teacher(plain, (plain > 0).long()).last_hidden_state
        out = student(mixed, (mixed > 0).long()).last_hidden_state
        known = origin >= 0
        wanted = target.gather(1, origin.clamp(min=0)[..., None].expand(-1, -1, target.shape[-1]))
        loss = F.mse_loss(out[known], wanted[known]) / wanted[known].var()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(budget.progress, step, args.lr, 20)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % args.every == 0:
            print(f"step {step} minutes {budget.used:.2f} relative error {loss.item():.4f}", flush=True)
    student.half().save_pretrained(work / "text_encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--smoke", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
