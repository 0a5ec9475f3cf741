"""The captions of the sprites. They name the sprites' parts, in several wordings, in English and Chinese."""

import numpy as np

from latent.sprites import ACTIONS, DIRECTIONS, split_characters
from text.words import number_words, split_words
from video.sprites import CHOICES, PARTS

# What people call the six bodies, trousers, tops and hairs: (colours, nouns), alternatives separated by spaces.
LOOKS = {
    "english": {
        "body": [("fair light", "skin"), ("yellow golden", "skin"), ("grey", "skin"), ("blue", "skin"),
                 ("tan bronze", "skin"), ("brown dark", "skin")],
        "trousers": [(colour, "trousers pants") for colour in ("white", "golden", "red", "grey", "blue", "green")],
        "top": [("red", "shirt"), ("blue", "shirt"), ("white", "shirt"), ("grey steel", "armour armor"),
                ("brown leather", "vest"), ("white", "suit jacket")],
        "hair": [(colour, "hair") for colour in ("green", "blue", "orange", "white", "red", "purple")]},
    "chinese": {
        "body": [(colour, "皮肤") for colour in ("浅", "黄", "灰", "蓝", "铜", "棕 深")],
        "trousers": [(colour, "裤子 长裤") for colour in "白金红灰蓝绿"],
        "top": [("红", "上衣 衬衫"), ("蓝", "上衣 衬衫"), ("白", "上衣 衬衫"), ("灰", "盔甲 铠甲"), ("棕", "背心 马甲"),
                ("白", "西装 外套")],
        "hair": [(colour, "头发") for colour in "绿蓝橙白红紫"]}}
LOOKING = {"english": ("{colour} {noun}", "with {colour} {noun}", "{noun} {be} {colour}"),
           "chinese": ("{colour}色{noun}", "{colour}{noun}", "{noun}是{colour}色")}
DOING = {
    "english": {"walk": ("walks", "walking"), "cast": ("casts a spell", "casting a spell"),
                "slash": ("slashes", "slashing"), "front": ("forward", "to the front", "facing forward"),
                "left": ("left", "to the left", "facing left"), "right": ("right", "to the right", "facing right")},
    "chinese": {"walk": ("走", "行走"), "cast": ("施法",), "slash": ("挥砍", "挥击"),
                "front": ("向前", "朝前", "面向前"), "left": ("向左", "朝左", "面向左"),
                "right": ("向右", "朝右", "面向右")}}
OPENINGS = {"english": ("", "", "a figure ", "a character "), "chinese": ("", "", "人物")}
KINDS = [(action, direction) for action in ACTIONS for direction in DIRECTIONS]
SIDES = {"english": ("on the left: ", "on the right: "), "chinese": ("左边：", "右边：")}
PARTNERS = 10  # figures that may stand beside each figure
EXAMPLE = "purple hair, white shirt, green trousers, walks left"


def look_of(character):
    """The choices of body, trousers, top and hair of a character: `video.sprites.parts_of` for one number, a list."""
    return [character // CHOICES**i % CHOICES for i in range(len(PARTS) - 1, -1, -1)]


def look_phrase(form, colour, noun):
    """One of the forms of `LOOKING`, filled in."""
    return form.format(colour=colour, noun=noun, be="are" if noun.endswith("s") else "is")


def sprite_caption(looks, kind, draw, whole=False, language=None):
    """A sentence about a sprite. looks: its choice of each of `PARTS`. kind: its action and direction, the number of
    `KINDS`.

    draw: a `random.Random` that chooses language, wording and order. Half of the sentences leave out something, unless
    whole is set.
    """
    language = language or draw.choice(("english", "english", "chinese"))
    phrases = []
    for part, look in zip(PARTS, looks, strict=True):
        colour, noun = (draw.choice(words.split()) for words in LOOKS[language][part][look])
        phrases.append(look_phrase(draw.choice(LOOKING[language]), colour, noun))
    action, direction = (draw.choice(DOING[language][word]) for word in KINDS[kind])
    phrases.append(f"{action} {direction}" if language == "english" else direction + action)
    if not whole and draw.random() < 0.5:
        phrases = [phrase for phrase in phrases if draw.random() < 0.6] or phrases[-1:]
    draw.shuffle(phrases)
    opening = draw.choice(OPENINGS[language])
    if language == "chinese":
        return opening + "，".join(phrases)
    joint = draw.choice((", ", " and ")) if phrases[1:] else ""
    return opening + ", ".join(phrases[:-1]) + joint + phrases[-1]


def pair_caption(figures, draw, whole=False):
    """A sentence about two sprites side by side, in either order. figures: (looks, kind) of the left and the right one.
    """
    language = draw.choice(("english", "english", "chinese"))
    parts = [side + sprite_caption(*figure, draw, whole, language)
             for side, figure in zip(SIDES[language], figures, strict=True)]
    draw.shuffle(parts)
    return "; ".join(parts)


def sprite_words(figures=1):
    """All words in the captions of so many sprites, sorted, and the number of words in the longest caption."""
    found, longest = set(), 0
    for language, parts in LOOKS.items():
        choices = [[look_phrase(form, colour, noun) for colours, nouns in looks for colour in colours.split()
                    for noun in nouns.split() for form in LOOKING[language]] for looks in parts.values()]
        choices += [[phrase for word in group for phrase in DOING[language][word]] for group in (ACTIONS, DIRECTIONS)]
        choices += [OPENINGS[language], ["and"] if language == "english" else [""]]
        sides = SIDES[language] if figures == 2 else ()
        found.update(word for side in sides for word in split_words(side))
        found.update(word for phrases in choices for phrase in phrases for word in split_words(phrase))
        one = sum(max(len(split_words(phrase)) for phrase in phrases) for phrases in choices)
        longest = max(longest, figures * one + sum(len(split_words(side)) for side in sides))
    return sorted(found), longest


class SpriteCaptions:
    """The captions of the training sprites, worded anew each time. Caption k is about kind k % 9 of character k // 9.

    figures: 1, or 2 for two sprites side by side. The left one of caption k is then number k % N of the N sprites, and
    the right one number `right`[k]: each left one has `PARTNERS` right ones, chosen at random.
    """

    example, fingerprint, summary = EXAMPLE, "", "captions are worded anew at each step, in English and Chinese"

    def __init__(self, figures=1):
        self.figures = [(look_of(number), kind) for number in split_characters(True).tolist()
                        for kind in range(len(KINDS))]
        self.right = np.concatenate([np.random.RandomState(seed).permutation(len(self.figures))
                                     for seed in range(PARTNERS)]) if figures == 2 else None
        self.vocabulary, self.length = sprite_words(figures)
        self.known = {word: number for number, word in enumerate(self.vocabulary)}

    def __len__(self):
        return len(self.figures if self.right is None else self.right)

    def read(self, number, draw):
        """Caption `number` as the numbers of its words, a list of `length` ints. draw: see `sprite_caption`."""
        left = self.figures[number % len(self.figures)]
        text = sprite_caption(*left, draw) if self.right is None else pair_caption(
            (left, self.figures[self.right[number]]), draw)
        return number_words(split_words(text), self.known, self.length)
