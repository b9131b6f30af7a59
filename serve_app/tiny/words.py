"""The words of captions, English and Chinese: tables only.

Knows nothing of how captions are put together (captions.py). In the tables by split, "test" belongs to the benchmark
and is never shown in training.
"""

from __future__ import annotations

COLOUR_WORDS = {
    "en": {"purple": ("purple", "purple", "violet"), "cyan": ("cyan", "cyan", "turquoise")},
    "zh": {
        "red": ("红色", "红色", "红"),
        "orange": ("橙色", "橙色", "橘色"),
        "yellow": ("黄色", "黄色", "黄"),
        "green": ("绿色", "绿色", "绿"),
        "cyan": ("青色", "青色", "青"),
        "blue": ("蓝色", "蓝色", "蓝"),
        "purple": ("紫色", "紫色", "紫"),
        "pink": ("粉色", "粉红色", "粉红"),
    },
}
SHAPE_WORDS = {
    "en": {
        "circle": ("circle", "circle", "disc", "ball"),
        "square": ("square", "square", "box"),
        "triangle": ("triangle",),
        "star": ("star", "star", "five-pointed star"),
    },
    "zh": {
        "circle": ("圆形", "圆形", "圆", "圆圈", "圆球"),
        "square": ("正方形", "正方形", "方块", "方形"),
        "triangle": ("三角形", "三角形", "三角"),
        "star": ("星形", "五角星", "星星"),
    },
}
GROUND_WORDS = {
    "en": {"gray": ("gray", "grey"), "navy": ("navy", "navy blue", "dark blue"), "beige": ("beige", "beige", "cream")},
    "zh": {
        "black": ("黑色",),
        "white": ("白色",),
        "gray": ("灰色",),
        "beige": ("米色", "米黄色"),
        "navy": ("深蓝色", "藏青色"),
    },
}
GROUND_PHRASE = {
    "en": {
        "train": (
            "on a {} background",
            "on a {} background",
            "against a {} background",
            "over a {} background",
            "with a {} background",
            "{} background",
            "the background is {}",
            "on {}",
        ),
        "test": ("in front of a {} background", "on a plain {} background", "the whole background is {}"),
    },
    "zh": {
        "train": ("在{}背景上", "{}背景", "背景是{}", "在{}的背景上", "背景为{}", "{}的背景", "在{}背景前"),
        "test": ("在{}背景下", "整个背景是{}的", "以{}为背景"),
    },
}
# (base, third person, -ing) verbs times adverbs for the four directions.
GO = (
    ("move", "moves", "moving"),
    ("move", "moves", "moving"),
    ("slide", "slides", "sliding"),
    ("go", "goes", "going"),
    ("drift", "drifts", "drifting"),
    ("travel", "travels", "travelling"),
    ("fly", "flies", "flying"),
)
WAY = {
    "left": ("left", "to the left", "leftward", "leftwards", "towards the left", "from right to left"),
    "right": ("right", "to the right", "rightward", "rightwards", "towards the right", "from left to right"),
    "up": ("up", "upward", "upwards", "to the top", "towards the top", "from bottom to top"),
    "down": ("down", "downward", "downwards", "to the bottom", "towards the bottom", "from top to bottom"),
}
CHANGE = {
    "bouncing": (
        ("bounce", "bounces", "bouncing"),
        ("bounce up and down", "bounces up and down", "bouncing up and down"),
        ("hop up and down", "hops up and down", "hopping up and down"),
    ),
    "growing": (
        ("grow", "grows", "growing"),
        ("get bigger", "gets bigger", "getting bigger"),
        ("grow larger", "grows larger", "growing larger"),
        ("become larger", "becomes larger", "becoming larger"),
        ("expand", "expands", "expanding"),
    ),
    "shrinking": (
        ("shrink", "shrinks", "shrinking"),
        ("get smaller", "gets smaller", "getting smaller"),
        ("become smaller", "becomes smaller", "becoming smaller"),
        ("contract", "contracts", "contracting"),
    ),
}
MOVE_ZH = {
    "left": ("向左移动", "往左移动", "向左滑动", "往左走", "从右向左移动", "从右往左移动", "向左飞", "朝左移动"),
    "right": ("向右移动", "往右移动", "向右滑动", "往右走", "从左向右移动", "从左往右移动", "向右飞", "朝右移动"),
    "up": ("向上移动", "往上移动", "向上滑动", "往上走", "从下向上移动", "从下往上移动", "向上飞", "上升"),
    "down": ("向下移动", "往下移动", "向下滑动", "往下走", "从上向下移动", "从上往下移动", "下降", "下落"),
    "bouncing": ("弹跳", "上下弹跳", "跳动", "上下跳动", "蹦跳", "弹来弹去"),
    "growing": ("变大", "逐渐变大", "慢慢变大", "越来越大", "放大", "不断变大"),
    "shrinking": ("变小", "逐渐变小", "慢慢变小", "越来越小", "缩小", "不断缩小"),
}
# {o} object(s), {i} -ing form, {f} finite form, {b} background phrase; a pattern without {b} gets none.
PATTERN = {
    "en": {
        "train": (
            "{o} {i} {b}",
            "{o} {i} {b}",
            "{o} {f} {b}",
            "{o} {i}, {b}",
            "a video of {o} {i} {b}",
            "{b}, {o} {f}",
            "an animation of {o} {i}, {b}",
            "{o} that {f} {b}",
            "there is {o} {i} {b}",
            "a clip with {o} {i} {b}",
            "{b}: {o} {i}",
            "please draw {o} {i} {b}",
            "{o}, {i}, {b}",
            "show {o} {i} slowly {b}",
            "in this simple video {o} {f} {b}",
            "a short film where {o} {f}, {b}",
            "i want {o} {i} {b}",
            "{o} smoothly {i} {b}",
            "make {o} {f} {b}",
        ),
        "test": (
            "a short clip that shows {o} {i}, {b}",
            "we see {o} {i} {b}",
            "{b}, we can see that {o} {f}",
            "show me a video in which {o} {f} {b}",
            "an animation: {o} {i} smoothly {b}",
            "{o} slowly {f}, {b}",
        ),
    },
    "zh": {
        "train": (
            "{o}{b}{m}",
            "{b}，{o}{m}",
            "{b}，{o}在{m}",
            "{o}{m}，{b}",
            "{o}正在{m}，{b}",
            "一段{o}{m}的视频，{b}",
            "视频里{o}{m}，{b}",
            "{m}的{o}，{b}",
            "请画{o}{m}，{b}",
            "动画：{o}{m}，{b}",
            "{b}，有{o}在{m}",
            "一个简单的动画，{o}{m}，{b}",
            "我想要{o}{m}，{b}",
            "画面中{o}{m}，{b}",
            "{o}，{m}，{b}",
            "短片里{o}缓缓{m}，{b}",
        ),
        "test": (
            "请生成一段视频：{b}，{o}正在{m}",
            "{b}，可以看到{o}在{m}",
            "{o}在画面里{m}，{b}",
            "短视频，{o}{m}，{b}",
            "我想看{o}{m}的动画，{b}",
        ),
    },
}
# Two objects with motions of their own: {o} tells everything but the background.
PAIR_ZH = {
    "train": (
        "{b}，{o}",
        "{o}，{b}",
        "画面中{o}，{b}",
        "动画：{o}，{b}",
        "请画{o}，{b}",
        "{b}，视频里{o}",
        "{b}，有{o}",
    ),
    "test": ("短视频：{o}，{b}", "{b}，可以看到{o}"),
}
FAULTS = {
    "en": ("blurry", "faded", "low contrast", "low quality", "blurred", "out of focus", "washed out", "poor quality"),
    "zh": ("模糊", "褪色", "低对比度", "低质量", "失焦", "画质差", "颜色暗淡"),
}
# Training only: what may stand in a caption and tells nothing. Chinese uses the characters of the directions and sizes
# everywhere ("in this light" ends in the one for "down"), and a model that saw them only as directions obeys them
# anywhere. None of these is a part of a held-out phrase (tests/tiny/test_text.py).
ASIDES = {
    "en": (
        "right now",
        "right here",
        "all right",
        "right away",
        "made the right way",
        "nothing left out",
        "what is left of the day",
        "left as it is",
        "written down",
        "down here",
        "sit down please",
        "calm down",
        "made up of simple parts",
        "cleaned up",
        "brought up to date",
        "hurry up",
        "top quality",
        "for a large screen",
        "in a small file",
        "a big hit",
        "it keeps its colour",
        "beautiful",
        "for children",
        "please",
        "two seconds long",
        "in one take",
    ),
    "zh": (
        "在柔和的灯光下",
        "在这种情况下",
        "在阳光下",
        "在月光下",
        "在夜空下",
        "在镜头下",
        "在蓝天下",
        "树下",
        "请看下面的内容",
        "接下来",
        "如下所示",
        "请稍等一下",
        "帮我画一下",
        "下午好",
        "桌上",
        "在屏幕上",
        "在画布上",
        "在纸上",
        "在地上",
        "上面说的",
        "以上内容",
        "如上",
        "晚上好",
        "马上",
        "上午",
        "网上流行",
        "两秒左右",
        "三十帧左右",
        "左思右想之后",
        "左邻右舍都喜欢",
        "大家好",
        "大约两秒",
        "大概",
        "小朋友喜欢",
        "小心",
        "从前",
        "向大家问好",
        "往常一样",
        "朝气蓬勃",
        "高清",
        "非常好看",
        "动态效果",
        "里面",
        "一段时间",
    ),
}
# How a single object is named: by split, because training counts more explicitly than the benchmark does.
ONE = {
    "en": {
        "train": ("{a}", "{a}", "{a}", "one {n}", "one {n}", "the {n}", "a single {n}", "only one {n}", "just one {n}"),
        "test": ("{a}", "{a}", "{a}", "one {n}", "the {n}", "a single {n}"),
    },
    "zh": {
        "train": ("一个", "一个", "一个", "一只", "单个", "只有一个", "仅仅一个", "单独一个"),
        "test": ("一个", "一个", "一个", "一只", "单个"),
    },
}
