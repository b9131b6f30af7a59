"""Reader of what a clip of moving shapes shows, from its frames alone.

Knows nothing of the model, the recipe or its renderer: the background is the median of the borders, objects are
connected components, colours are hues, shapes are harmonics of the outline seen from the centre, directions come from
the track of centres and areas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HUES = {
    "red": 358.0,
    "orange": 30.0,
    "yellow": 54.0,
    "green": 132.0,
    "cyan": 183.0,
    "blue": 228.0,
    "purple": 278.0,
    "pink": 331.0,
}
CONTRAST = 0.2  # of the full range, in any channel: less is background
SMALLEST = 0.0016  # of the frame's pixels: less is a speck


@dataclass
class Seen:
    """One object: words for colour, shape and motion."""

    colour: str
    shape: str
    motion: str


def components(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the 8-connected regions of a bool mask [H, W], largest first, as (rows, columns) of their pixels.

    Works on runs of pixels, row by row, joined by union-find: these pictures have few runs.
    """
    padded = np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)
    change = np.diff(padded, axis=1)
    rows, starts = np.nonzero(change == 1)
    ends = np.nonzero(change == -1)[1]
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_of_row = np.searchsorted(rows, np.arange(mask.shape[0] + 1))
    for i, (row, start, end) in enumerate(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)):
        if row:
            for j in range(first_of_row[row - 1], first_of_row[row]):
                if starts[j] <= end and ends[j] >= start:
                    parent[root(j)] = root(i)
    groups: dict[int, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(root(i), []).append(i)
    out = []
    for runs in groups.values():
        ys = np.concatenate([np.full(ends[i] - starts[i], rows[i]) for i in runs])
        xs = np.concatenate([np.arange(starts[i], ends[i]) for i in runs])
        out.append((ys, xs))
    return sorted(out, key=lambda v: -len(v[0]))


def hue(rgb: Tensor) -> float:
    r, g, b = (float(v) for v in rgb)
    return math.degrees(math.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360


def colour_word(rgb: Tensor) -> str:
    angle = hue(rgb)
    return min(HUES, key=lambda name: abs((angle - HUES[name] + 180) % 360 - 180))


def outline(cover: Tensor, centre: Tensor, reach: float) -> Tensor:
    """Return the radius of the shape along 120 rays, [N, 120].

    Coverage [N, H, W] in 0..1 is integrated from centre [N, 2] (x, y).
    """
    _, h, w = cover.shape
    steps = max(8, int(reach * 2))
    angle = torch.arange(120, device=cover.device) * (2 * math.pi / 120)
    radius = (torch.arange(steps, device=cover.device) + 0.5) * (reach / steps)
    x = centre[:, 0, None, None] + radius[None, None] * angle.sin()[None, :, None]
    y = centre[:, 1, None, None] - radius[None, None] * angle.cos()[None, :, None]
    grid = torch.stack([(x + 0.5) * 2 / w - 1, (y + 0.5) * 2 / h - 1], -1)
    return F.grid_sample(cover[:, None], grid, align_corners=False)[:, 0].sum(-1) * (reach / steps)


def shape_word(radii: Tensor) -> str:
    """Name the harmonic that dominates the mean outline [120]: 3 triangle, 4 square, 5 star, none circle."""
    spectrum = torch.fft.rfft(radii).abs() / radii.sum()
    three, four, five = (float(spectrum[k]) for k in (3, 4, 5))
    if max(three, four, five) < 0.022:
        return "circle"
    # A triangle seen from its centre has about a quarter of harmonic 3; a square a tenth of harmonic 4 at most.
    return max((("triangle", three / 0.15), ("square", four / 0.05), ("star", five / 0.13)), key=lambda v: v[1])[0]


def motion_word(centres: Tensor, areas: Tensor, sides: tuple[int, int]) -> str:
    """Name the motion of centres [T, 2] (x, y) and areas [T] in pixels; sides are (height, width)."""
    t = len(areas)
    if t < 3:
        return "static"
    q = max(1, t // 5)
    growth = math.log(float(areas[-q:].mean()) / max(1.0, float(areas[:q].mean())))
    if abs(growth) > math.log(1.7):
        return "growing" if growth > 0 else "shrinking"
    dx, dy = ((centres[-q:].mean(0) - centres[:q].mean(0)) / min(sides)).tolist()
    y = centres[:, 1] / sides[0]
    travel, net = float((y[1:] - y[:-1]).abs().sum()), abs(float(y[-1] - y[0]))
    if travel > 2 * net + 0.15 and travel > 0.25 and travel > 1.5 * abs(dx):
        return "bouncing"
    if max(abs(dx), abs(dy)) < 0.06:
        return "static"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def read(clip: Tensor) -> list[Seen]:
    """Return the objects seen in a clip [T, H, W, 3] of values 0..1, on the CPU.

    The list's length is the count; two objects at most are described, others are blank.
    """
    t, h, w, _ = clip.shape
    ring = torch.cat(
        [
            clip[:, :3].flatten(0, 2),
            clip[:, -3:].flatten(0, 2),
            clip[:, :, :3].flatten(0, 2),
            clip[:, :, -3:].flatten(0, 2),
        ]
    )
    ground = ring.median(0).values
    away = clip - ground
    mask = (away.abs().amax(-1) > CONTRAST).cpu().numpy()
    label = torch.zeros(t, h, w, dtype=torch.long)
    frames: list[list[tuple[int, float, Tensor]]] = []
    for f in range(t):
        found = []
        for name, (ys, xs) in enumerate(components(mask[f]), 1):
            if len(ys) >= SMALLEST * h * w:
                label[f, torch.from_numpy(ys), torch.from_numpy(xs)] = name
                found.append((name, float(len(ys)), torch.tensor([xs.mean(), ys.mean()], dtype=torch.float32)))
        frames.append(found)
    counts = torch.tensor([len(v) for v in frames])
    count = int(counts.mode().values)
    seen: list[Seen] = []
    if count == 0:
        return seen
    # Tracks use the frames that show at least the usual number of objects.
    used = [f for f in range(t) if len(frames[f]) >= count]
    wanted = min(count, 2)
    tracks: list[list[tuple[int, int, float, Tensor]]] = [[] for _ in range(wanted)]
    for f in used:
        best = frames[f][:wanted]
        if wanted == 2 and tracks[0]:
            straight = sum(float((best[i][2] - tracks[i][-1][3]).norm()) for i in range(2))
            crossed = sum(float((best[1 - i][2] - tracks[i][-1][3]).norm()) for i in range(2))
            best = best if straight <= crossed else best[::-1]
        for i, (name, size, centre) in enumerate(best):
            tracks[i].append((f, name, size, centre))
    for track in tracks:
        sizes = torch.tensor([v[2] for v in track])
        centres = torch.stack([v[3] for v in track])
        big = sizes.argsort(descending=True)[: max(1, len(track) // 2)].tolist()
        index = torch.tensor([track[k][0] for k in big])
        names = torch.tensor([track[k][1] for k in big])
        own = label[index] == names[:, None, None]
        others = (label[index] > 0) & ~own
        contrast = away[index].abs().amax(-1) * own
        core = contrast > 0.7 * contrast.flatten(1).amax(1)[:, None, None]
        rgb = clip[index][core].median(0).values
        axis = rgb - ground
        cover = ((away[index] @ axis) / (axis @ axis)).clamp(0, 1) * ~others
        reach = min(0.7 * min(h, w), 2.2 * math.sqrt(float(sizes.max()) / math.pi) + 2)
        mid = centres[big]
        radii = outline(cover, mid, reach)
        radii = radii / radii.mean(1, keepdim=True).clamp(min=1e-3)
        seen.append(Seen(colour_word(rgb), shape_word(radii.median(0).values), motion_word(centres, sizes, (h, w))))
    seen.extend(Seen("", "", "") for _ in range(count - wanted))
    return seen


def judge(seen: list[Seen], wanted: list[Seen]) -> dict[str, bool]:
    """Judge whether count, colour, shape and direction are as asked, for all objects under the best pairing.

    A prompt that names two objects says nothing of which is where, so neither its order nor places are asked for; but
    one pairing answers all questions, so a colour that sits on the other object's shape is wrong in one of them.
    """
    orders = [wanted] if len(wanted) == 1 else [wanted, wanted[::-1]]
    best: dict[str, bool] = {}
    for order in orders:
        pairs = list(zip(seen[: len(order)], order, strict=False))
        whole = len(pairs) == len(order)
        verdict = {
            "colour": whole and all(a.colour == b.colour for a, b in pairs),
            "shape": whole and all(a.shape == b.shape for a, b in pairs),
            "direction": whole and all(a.motion == b.motion for a, b in pairs),
            "count": len(seen) == len(wanted),
        }
        if not best or sum(verdict.values()) > sum(best.values()):
            best = verdict
    return best
