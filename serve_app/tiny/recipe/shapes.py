"""Scenes of one or two coloured shapes that move, and their renderer.

Knows nothing of captions or models. Everything is batched tensors on one device, so that thousands of clips are
drawn in a second on a GPU; the same code draws a handful on a CPU for tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 135, 10),
    "yellow": (250, 225, 30),
    "green": (30, 165, 60),
    "cyan": (30, 205, 215),
    "blue": (35, 75, 230),
    "purple": (140, 45, 195),
    "pink": (255, 120, 185),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 14),
    "white": (244, 244, 244),
    "gray": (128, 128, 128),
    "beige": (222, 205, 172),
    "navy": (18, 26, 78),
}
MOTIONS = ("left", "right", "up", "down", "bouncing", "growing", "shrinking")
HORIZONTAL = (0, 1)
VERTICAL = (2, 3, 4)

# Points, inner/outer radius, rotation and size per shape; a regular n-gon is a star whose inner ratio is cos(pi/n).
# The sizes make the four areas alike, so that area never tells the shape.
_POINTS = (1.0, 4.0, 3.0, 5.0)
_INNER = (1.0, math.cos(math.pi / 4), 0.5, 0.45)
_TURN = (0.0, math.pi / 4, 0.0, 0.0)
_SIZE = (1.0, 1.22, 1.42, 1.48)


@dataclass
class Scenes:
    """N scenes of up to two objects; all index tensors are int64.

    Attributes:
        background: [N].
        count: number of objects, 1 or 2, [N].
        shape: [N, 2], as are `colour` and `motion`.
        vertical_split: [N]; with 1 the objects stay in the left and the right half, with 0 in the upper and the lower
            one. The first object is the left or upper one.
        chance: uniform numbers that fix sizes and paths, [N, 2, 6].
        blur: width of edges in pixels of a picture of 128, 0 is sharp, [N].
        fade: share of the background mixed into objects, 0 to 1, [N].
    """

    background: Tensor
    count: Tensor
    shape: Tensor
    colour: Tensor
    motion: Tensor
    vertical_split: Tensor
    chance: Tensor
    blur: Tensor
    fade: Tensor

    def __len__(self) -> int:
        return self.background.shape[0]

    def pick(self, index: Tensor | slice) -> Scenes:
        """Return some of the scenes."""
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Scenes:
        """Return the scenes on a device."""
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def _is(motion: Tensor, kinds: tuple[int, ...]) -> Tensor:
    return torch.stack([motion == k for k in kinds]).any(0)


def make_scenes(shape: Tensor, colour: Tensor, motion: Tensor, count: Tensor, generator: torch.Generator) -> Scenes:
    """Complete the objects ([N, 2] each, [N] counts, on the CPU) with a background, sizes and paths drawn at random."""
    n = count.shape[0]

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    horizontal, vertical = _is(motion, HORIZONTAL), _is(motion, VERTICAL)
    any_h, any_v = horizontal.any(1), vertical.any(1)
    # Two movers on one axis get parallel lanes; otherwise either split keeps them apart.
    split = torch.where(any_v & ~any_h, 1, torch.where(any_h & ~any_v, 0, (draw(n) < 0.5).long()))
    return Scenes(
        background=torch.randint(len(BACKGROUNDS), (n,), generator=generator),
        count=count,
        shape=shape,
        colour=colour,
        motion=motion,
        vertical_split=split,
        chance=draw(n, 2, 6),
        blur=torch.zeros(n),
        fade=torch.zeros(n),
    )


def random_scenes(
    n: int, generator: torch.Generator, two: float = 0.5, forbidden: Tensor | None = None, alike: float = 0.25
) -> Scenes:
    """Draw n random scenes. A share `two` has two objects, and a share `alike` of these has two equal ones.

    Objects whose triple is set in `forbidden`, bool [colours, shapes, motions], are never drawn: the held-out set.
    Of the pairs that differ, a sixth has the same shape and colour and another sixth the same motion, because captions
    name these once or in the same words. The rest differ in everything: each object must keep its own words.
    """
    pool = torch.cartesian_prod(*(torch.arange(k) for k in (len(COLOURS), len(SHAPES), len(MOTIONS))))
    if forbidden is not None:
        pool = pool[~forbidden[pool[:, 0], pool[:, 1], pool[:, 2]]]
    allowed = torch.zeros(len(COLOURS), len(SHAPES), len(MOTIONS), dtype=torch.bool)
    allowed[pool[:, 0], pool[:, 1], pool[:, 2]] = True
    first = pool[torch.randint(len(pool), (n,), generator=generator)]
    second = pool[torch.randint(len(pool), (n,), generator=generator)]
    u = torch.rand(n, generator=generator)[:, None]
    differ = (1 - alike) / 6
    look = torch.cat([first[:, :2], second[:, 2:]], 1)
    move = torch.cat([second[:, :2], first[:, 2:]], 1)
    wish = torch.where(u < alike + differ, look, torch.where(u < alike + 2 * differ, move, second))
    # A wish that lands on a held-out triple falls back to a pair that shares nothing on purpose.
    second = torch.where(allowed[wish[:, 0], wish[:, 1], wish[:, 2]][:, None], wish, second)
    second = torch.where(u < alike, first, second)
    count = 1 + (torch.rand(n, generator=generator) < two).long()
    objects = torch.stack([first, second], 1)
    return make_scenes(objects[..., 1], objects[..., 0], objects[..., 2], count, generator)


def degrade(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """Blur and fade scenes in place, as the negative captions describe them, and return them."""
    n = len(scenes)
    scenes.blur = 10 + 14 * torch.rand(n, generator=generator)
    scenes.fade = 0.35 + 0.35 * torch.rand(n, generator=generator)
    return scenes


def paths(scenes: Scenes, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the objects' centres [N, 2, frames, 2] (x, y) and radii [N, 2, frames], in pixels.

    The whole movement fits the clip whatever its length, so objects never leave the frame.
    """
    u = scenes.chance
    device = u.device
    t = torch.linspace(0, 1, frames, device=device) if frames > 1 else torch.full((1,), 0.5, device=device)
    pair = (scenes.count == 2)[:, None]
    side = scenes.vertical_split[:, None]
    half = torch.tensor([0.0, 0.5], device=device)
    x_lo = torch.where(pair & (side == 1), half, 0.0) * width
    y_lo = torch.where(pair & (side == 0), half, 0.0) * height
    box_w = torch.where(pair & (side == 1), 0.5, 1.0) * width
    box_h = torch.where(pair & (side == 0), 0.5, 1.0) * height
    small = torch.minimum(box_w, box_h)
    radius = torch.where(pair, 0.19 + 0.05 * u[..., 0], 0.12 + 0.05 * u[..., 0]) * small
    grows, shrinks = scenes.motion == 5, scenes.motion == 6
    big = torch.where(pair, 0.30, 0.22 + 0.06 * u[..., 1]) * small
    little = torch.where(pair, 0.12, 0.065 + 0.02 * u[..., 2]) * small
    start = torch.where(grows, little, torch.where(shrinks, big, radius))
    end = torch.where(grows, big, torch.where(shrinks, little, radius))
    r = start[..., None] + (end - start)[..., None] * t
    margin = 1.5 * torch.maximum(start, end)

    def span(low: Tensor, size: Tensor, a: Tensor) -> Tensor:
        return low + margin + a * (size - 2 * margin).clamp(min=0)

    def travel(low: Tensor, size: Tensor) -> Tensor:
        begin = span(low, size, 0.15 * u[..., 3])[..., None]
        return begin + (span(low, size, 1 - 0.15 * u[..., 4])[..., None] - begin) * t

    # A single object keeps to the middle, where no object of a pair has its lane: a place that could be either's let
    # the model begin two. It must also settle on one place from noise, which is easier the fewer there are.
    across_at, along_at = (torch.where(pair, u[..., k], 0.2 + 0.6 * u[..., k]) for k in (4, 5))
    x = span(x_lo, box_w, across_at)[..., None].expand_as(r)
    y = span(y_lo, box_h, along_at)[..., None].expand_as(r)
    m = scenes.motion[..., None]
    across, along = travel(x_lo, box_w), travel(y_lo, box_h)
    x = torch.where(m == 1, across, torch.where(m == 0, across.flip(-1), x))
    y = torch.where(m == 3, along, torch.where(m == 2, along.flip(-1), y))
    # Hops stay below half the height: four steps of a fast ball share one latent frame and would smear.
    floor, top = span(y_lo, box_h, 1 - 0.3 * u[..., 3]), span(y_lo, box_h, 0.25 + 0.2 * u[..., 5])
    hop = (math.pi * 2 * t).sin().abs()
    y = torch.where(m == 4, floor[..., None] - (floor - top)[..., None] * hop, y)
    return torch.stack([x, y], -1), r


def render(scenes: Scenes, frames: int, height: int, width: int) -> Tensor:
    """Render clips [N, 3, frames, height, width] in [-1, 1]. Edges are smooth over one pixel, or over `blur`."""
    device = scenes.chance.device
    centre, radius = paths(scenes, frames, height, width)
    palette = torch.tensor(list(COLOURS.values()), device=device) / 127.5 - 1
    ground = (torch.tensor(list(BACKGROUNDS.values()), device=device) / 127.5 - 1)[scenes.background]
    xs = torch.arange(width, device=device) + 0.5
    ys = torch.arange(height, device=device) + 0.5
    clip = ground[:, :, None, None, None].expand(-1, -1, frames, height, width)
    edge = (scenes.blur * min(height, width) / 128).clamp(min=1)[:, None, None, None]
    for i in range(2):
        dx = xs - centre[:, i, :, 0, None, None]
        dy = ys[:, None] - centre[:, i, :, 1, None, None]
        kind = scenes.shape[:, i]
        n, inner, turn, size = (
            torch.tensor(v, device=device)[kind][:, None, None, None] for v in (_POINTS, _INNER, _TURN, _SIZE)
        )
        outer = radius[:, i, :, None, None] * size
        rho = (dx * dx + dy * dy).sqrt()
        # Fold every point into half a wedge; there the outline is the line from the tip to the inner corner.
        wedge = 2 * math.pi / n
        theta = ((torch.atan2(dx, -dy) + turn + wedge / 2).remainder(wedge) - wedge / 2).abs()
        px, py = rho * theta.cos(), rho * theta.sin()
        cx, cy = inner * (wedge / 2).cos(), inner * (wedge / 2).sin()
        length = ((1 - cx) ** 2 + cy**2).sqrt()
        line = (cy * (px - outer) + (1 - cx) * py) / length
        distance = torch.where((kind == 0)[:, None, None, None], rho - outer, line)
        present = (scenes.count > i).float()[:, None, None, None]
        cover = (0.5 - distance / edge).clamp(0, 1) * present * (1 - scenes.fade[:, None, None, None])
        paint = palette[scenes.colour[:, i]][:, :, None, None, None]
        clip = clip + cover[:, None] * (paint - clip)
    return clip
