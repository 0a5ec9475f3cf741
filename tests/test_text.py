"""Words to pictures: captions, the network that reads them, the commands, and what is said of bad input."""

from support.commands import UserError

import itertools
import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_refused, learn, load, same
from PIL import Image
from test_dit import randomize
from test_video_sprites import load as load_sprites
from test_video_sprites import make_clips

import text.draw
import text.score
import text.train
import train as root
from dit_block import Attention
from latent.config import LatentConfig
from latent.sprites import split_characters
from record.checkpoint import load_checkpoint, save_checkpoint
from text.captions import KINDS, LOOKS, SpriteCaptions, look_of, pair_caption, sprite_caption, sprite_words
from text.config import TextConfig
from text.data import CaptionedFolder, Pairs
from text.dit import TextDiT, WordAttention
from text.score import Reader, ask_swapped, compare, swaps, wilson
from text.words import read_prompt, split_words
from video import sprites
from video.clips import Clips
from video.dit import RotaryAttention, rotations
from video.sprites import PARTS, parts_of

TINY = ["--dataset", "folder", "--hidden-size", 32, "--depth", 1, "--num-heads", 2, "--text-depth", 1, "--batch-size",
        4, "--sample-steps", 2, "--warmup", 1, "--log-every", 1, "--device", "cpu", "--precision", "fp32"]
CAPTIONS = ["a red square", "blue square", "一个红色的圆", "a blue circle"]


@pytest.fixture
def folder(tmp_path):
    """Four images of 8 x 8 pixels with captions beside them."""
    place = tmp_path / "mine"
    (place / "deep").mkdir(parents=True)
    for i, caption in enumerate(CAPTIONS):
        file = place / ("deep" if i == 3 else ".") / f"{i}.png"
        Image.fromarray(np.full((8, 8, 3), (60 * i, 20, 255 - 60 * i), np.uint8)).save(file)
        file.with_suffix(".txt").write_text(caption, "utf-8")
    return place


def prompt_config(**settings):
    words = ("a", "and", "hair", "purple", "shirt", "white", "左", "走")
    return TextConfig(words=words, length=5, example="purple hair", **settings)


# Words


def test_words_of_any_language():
    assert split_words("Purple hair,WHITE-shirt; it's 2") == ["purple", "hair", "white", "shirt", "it", "s", "2"]
    assert split_words("紫色头发，walks向左！") == ["紫", "色", "头", "发", "walks", "向", "左"]
    assert split_words("ＡＢ　Ｃ") == ["ab", "c"] and split_words(" ,。_ ") == []


def test_a_prompt_is_numbers_and_behind_them_the_null_label():
    assert read_prompt("White hair, 走!", prompt_config()) == [5, 2, 7, 8, 8]


@pytest.mark.parametrize("prompt, words", [
    ("", ["no word", "such as 'purple hair'"]), ("，。!", ["no word"]),
    ("dragon", ["not learned 'dragon'", "purple hair"]),
    ("purpel hair 龙", ["'purpel' (near it: purple)", "'龙'"]),
    ("a purple hair and white shirt", ["6 words", "learned 5"])])
def test_a_prompt_that_says_nothing_is_refused(prompt, words):
    with pytest.raises(UserError) as error:
        read_prompt(prompt, prompt_config())
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# The captions of the sprites


def test_a_caption_says_every_part_whatever_its_wording():
    """What was said can be read off it: each part by its colour, of the nouns that only this part has."""
    draw, orders, languages = random.Random(0), set(), Counter()
    for number in range(0, 1296, 5):
        kind, look = number % len(KINDS), look_of(number)
        text = sprite_caption(look, kind, draw, whole=True)
        words = split_words(text)
        language = "english" if "a" <= words[-1] < "{" else "chinese"
        languages[language] += 1
        places = []
        for part, choice in zip(PARTS, look, strict=True):
            said = {k for k, looks in enumerate(LOOKS[language][part])
                    for phrase in text.replace("，", ",").replace(" and ", ",").split(",")
                    if all(any(word in phrase for word in words.split()) for words in looks)}
            assert said == {choice}, text
            places.append(min(text.index(noun) for noun in LOOKS[language][part][choice][1].split() if noun in text))
        orders.add(tuple(np.argsort(places)))
        directions = {"front": ("forward", "front", "前"), "left": ("left", "左"), "right": ("right", "右")}
        assert any(word in words for word in directions[KINDS[kind][1]])
    assert len(orders) == 24 and min(languages.values()) > 50


def test_captions_leave_something_out_and_are_a_function_of_their_seed():
    captions = SpriteCaptions()
    texts = [captions.read(8, random.Random(seed)) for seed in range(60)]
    assert texts == [captions.read(8, random.Random(seed)) for seed in range(60)]
    lengths = [sum(number < len(captions.vocabulary) for number in text) for text in texts]
    assert len({tuple(text) for text in texts}) > 55 and min(lengths) < 8 < 15 < max(lengths)
    assert captions.vocabulary == sorted(set(captions.vocabulary)) and len(captions) == 9000


@pytest.mark.parametrize("figures", [1, 2])
def test_no_caption_is_longer_than_the_longest(figures):
    draw, (words, longest) = random.Random(1), sprite_words(figures)
    found = []
    for _ in range(8000):
        two = [([draw.randrange(6) for _ in PARTS], draw.randrange(9)) for _ in range(2)]
        text = sprite_caption(*two[0], draw, whole=True) if figures == 1 else pair_caption(two, draw, whole=True)
        found.append(split_words(text))
    assert {word for text in found for word in text} == set(words)
    assert longest - 3 * (figures - 1) <= max(map(len, found)) <= longest


# The network


def test_words_are_looked_up_beside_the_patches():
    """As if they were patches too, which ask nothing themselves and stand in no place."""
    words, plain, rotary = WordAttention(16, 2), Attention(16, 2), RotaryAttention(16, 2)
    plain.load_state_dict(words.state_dict())
    rotary.load_state_dict(words.state_dict())
    x, y = torch.randn(2, 3, 5, 16)
    torch.testing.assert_close(words(x, y), plain(torch.cat([x, y], dim=1))[:, :5])
    turn = rotations([5], 8)
    still = torch.stack([torch.ones(5, 4), torch.zeros(5, 4)])
    expected = rotary(torch.cat([x, y], dim=1), torch.cat([turn, still], dim=1))[:, :5]
    torch.testing.assert_close(words(x, y, turn), expected)
    assert (words(x, y) - expected).abs().max() > 1e-4


def test_a_word_begins_as_the_sum_of_itself_and_the_one_before():
    """An untrained block is the identity."""
    encoder = TextDiT((1, 8, 8), (1, 4, 4), 3, num_classes=9, hidden_size=16, num_heads=2, depth=1, length=3).encoder
    a, b, c = words = torch.randn(3, 16)
    expected = torch.nn.functional.layer_norm(torch.stack([a, a + b, b + c]), (16,), eps=1e-6)
    torch.testing.assert_close(encoder(words[None], torch.randn(1, 16))[0], expected)


@pytest.fixture
def network():
    return randomize(TextDiT((1, 8, 8), (1, 4, 4), 3, num_classes=9, hidden_size=16, num_heads=2, depth=2, length=4,
                             text_depth=1, rope=True))


def test_the_order_of_words_matters_and_an_empty_caption_is_the_null_label(network):
    x, texts = torch.randn(1, 3, 1, 8, 8).expand(4, -1, -1, -1, -1), torch.tensor(
        [[1, 2, 3, 4], [3, 2, 1, 4], [1, 2, 3, 9], [9, 9, 9, 9]])
    out = network(x, 5, texts)
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(out, 2))
    process = TextConfig().build_process()
    guided = process.predict(network, x, torch.full((4,), 5), texts, 2.0)
    torch.testing.assert_close(guided, out[3] + 2 * (out - out[3]))


def test_guidance_leads_away_from_a_negative_caption(network):
    x, texts = torch.randn(2, 3, 1, 8, 8), torch.tensor([[1, 2, 3, 4], [5, 6, 9, 9]])
    against = text.draw.Against(network, [7, 8, 9, 9])
    process = TextConfig().build_process()
    cond, uncond = (network(x, 5, words) for words in (texts, torch.tensor([[7, 8, 9, 9]]).expand(2, -1)))
    guided = process.predict(against, x, torch.full((2,), 5), texts, 3.0)
    torch.testing.assert_close(guided, uncond + 3 * (cond - uncond))


# Pairs


def test_two_figures_stand_where_their_caption_says():
    frames = SimpleNamespace(shape=(1, 2, 2), settings=dict(image_size=(2, 2)), x_0=lambda index, part, generator: (
        index[part].float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)))
    captions = SpriteCaptions(2)
    N = len(captions.figures)
    numbers = torch.arange(N)
    pairs = Pairs(Clips("sprites", frames, numbers, torch.ones_like(numbers), numbers, 1), captions)
    assert pairs.shape == (1, 1, 2, 4) and pairs.settings["image_size"] == (1, 2, 4) and len(pairs.labels) == 10 * N
    index = torch.tensor([3, N + 3, 5 * N + 7])
    x = pairs.x_0(index, slice(1, 3), torch.Generator())[:, 0, 0, 0]                                    # (2, 4)
    right = captions.right[index[1:]]
    assert x.tolist() == [[3, 3, right[0], right[0]], [7, 7, right[1], right[1]]] and right[0] != captions.right[3]
    two = captions.figures[3], captions.figures[captions.right[N + 3]]
    said = split_words(pair_caption(two, random.Random(5)))
    assert [captions.vocabulary[k] for k in captions.read(N + 3, random.Random(5))[:len(said)]] == said
    two = ([0, 0, 0, 0], 0), ([5, 5, 5, 5], 1)
    for seed in range(20):
        said = pair_caption(two, random.Random(seed), whole=True)
        for side, hair in zip(*((("左", "右"), "绿紫") if "边" in said else (("on the left", "on the right"),
                                                                      ("green", "purple"))), strict=True):
            start = said.index(side + ("边" if "边" in said else ""))
            mine = said[start:].split("; ")[0]
            assert hair in mine


def test_each_figure_is_decoded_by_itself(monkeypatch):
    seen = []
    monkeypatch.setattr(LatentConfig, "to_images", lambda self, x: seen.append(x) or x + 1)
    x = torch.arange(16.0).view(1, 1, 1, 2, 8)
    assert torch.equal(TextConfig(figures=2).to_images(x), x + 1) and len(seen) == 2
    assert torch.equal(seen[0], x[..., :4]) and torch.equal(seen[1], x[..., 4:])


# One's own images


def test_captions_beside_images(folder, capsys):
    found = CaptionedFolder(folder)
    assert [file.name for file in found.files] == ["0.png", "1.png", "2.png", "3.png"]
    assert found.captions == CAPTIONS and found.shape == (3, 8, 8)
    (folder / "alone.txt").write_text("of no image")
    assert not capsys.readouterr().err and CaptionedFolder(folder)
    assert capsys.readouterr().err == f"{folder}: left out 1 file: 1 .txt\n"


def test_a_table_of_captions(folder, capsys):
    for file in folder.rglob("*.txt"):
        file.unlink()
    rows = [{"file_name": "deep/3.png", "text": "third"}, {"file_name": "0.png", "text": "first"},
            {"file_name": "1.png", "text": " "}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (folder / "notes.md").write_text("")
    assert CaptionedFolder(folder).captions == ["first", " ", "", "third"]
    said = capsys.readouterr().err.splitlines()
    assert said == [f"1 of 4 images have no caption, such as {folder / '2.png'}: they are learned without",
                    f"1 of 4 images have an empty caption, such as {folder / '1.png'}: they are learned without",
                    f"{folder}: left out 1 file: 1 .md"]


@pytest.mark.parametrize("name, content, words", [
    ("0.txt", b"\xff\xfered", ["0.txt is not UTF-8"]),
    ("0.txt", b"word " * 300, ["0.png has 300 words", "256"]),
    ("metadata.jsonl", b'{"file_name": "4.png", "text": "x"}', ["line 1", "'4.png'", "no image there"]),
    ("metadata.jsonl", b'\n{"file_name": "0.png"}', ["line 2", "not of the form"]),
    ("metadata.jsonl", b"[" * 9999, ["line 1", "not of the form"]),
    ("metadata.jsonl", b"{not json", ["line 1", "not of the form"]),
    ("metadata.jsonl", b'{"file_name": "0.png", "text": "x"}', ["0.txt", "another in metadata.jsonl"])])
def test_bad_captions_are_one_line(folder, call, tmp_path, name, content, words):
    (folder / name).write_bytes(content)
    result = call(text.train, *TINY, "--data-dir", folder, "--steps", 1, "--run-dir", tmp_path / "run")
    assert_refused(result, *words)
    assert not (tmp_path / "run" / "model.pth").exists() and (folder / name).read_bytes() == content


def test_images_without_any_caption_are_refused(folder, call, tmp_path):
    for file in folder.rglob("*.txt"):
        file.write_text("...")
    flags = [*TINY, "--steps", 1, "--run-dir", tmp_path / "run", "--data-dir"]
    assert_refused(call(text.train, *flags, folder), "no image in", "has a caption", "metadata.jsonl")
    (tmp_path / "empty").mkdir()
    assert_refused(call(text.train, *flags, tmp_path / "empty"), "holds no image")
    assert_refused(call(text.train, *flags, folder, "--image-size", "4x8x8"), "images are no clips")


# The commands


def test_a_folder_is_learned_and_drawn(folder, call, tmp_path, monkeypatch):
    run = tmp_path / "run"
    flags = [*TINY, "--data-dir", folder, "--steps", 4, "--run-dir", run]
    code, out, err = call(text.train, *flags)
    assert code == 0 and "4 captioned images; folder: 4 images of 8 x 8, colour; captions from" in out
    assert "up to 6 at a time" in out and f"python -m text.draw --checkpoint {run}" in out, err
    content = load_checkpoint(run / "model.pth", (TextConfig,))
    assert content["config"].words == tuple(sorted({word for caption in CAPTIONS for word in split_words(caption)}))
    assert content["config"].image_size == (1, 8, 8) and content["config"].patch_size == (1, 2, 2)
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(text.draw, "blue circle", "红色的圆", "--count", 3, "--checkpoint", run)
    assert code == 0 and "column 2: 红色的圆\nsamples.png: 6 images" in out
    assert Image.open("samples.png").size == (2 * 58 + 2, 3 * 58 + 2)
    before = (tmp_path / "samples.png").read_bytes()
    call(text.draw, "blue circle", "红色的圆", "--count", 3, "--checkpoint", run, "--negative", "red square",
         "--guidance", 3, "--out", "away.png")
    assert (tmp_path / "away.png").read_bytes() != before
    for prompts, words in ((["", "a circle"], ["no word"]), (["a sqare"], ["sqare", "square"]),
                           (["a circle", "--negative", "cat"], ["'cat'"]),
                           (["a circle", "--negative", "red", "--guidance", 1], ["--negative does nothing"])):
        assert_refused(call(text.draw, *prompts, "--checkpoint", run), *words)
    assert (tmp_path / "samples.png").read_bytes() == before
    assert_refused(call(text.score, "--checkpoint", run), "only sprites")
    with pytest.raises(UserError, match="model of text: draw with it by python -m text"):
        load(run / "model.pth")


def test_a_resumed_run_is_the_same_run(folder, call, tmp_path):
    flags = [*TINY, "--data-dir", folder, "--steps", 6, "--run-dir"]
    call(text.train, *flags, tmp_path / "whole")
    text.train.train(load_flags(folder), run_dir=tmp_path / "part", device="cpu", until=3)
    assert call(text.train, *flags, tmp_path / "part", "--resume")[0] == 0
    whole, part = (load_checkpoint(tmp_path / name / "model.pth", (TextConfig,)) for name in ("whole", "part"))
    assert same(whole["model"], part["model"]) and same(whole["ema"], part["ema"])


def load_flags(folder):
    return dict(dataset="folder", data_dir=str(folder), hidden_size=32, depth=1, num_heads=2, text_depth=1,
                batch_size=4, sample_steps=2, warmup=1, log_every=1, precision="fp32", steps=6)


def test_the_captions_of_a_step_do_not_depend_on_the_shares(folder, monkeypatch):
    config = TextConfig(**load_flags(folder) | dict(batch_size=6, label_dropout=0.4))
    data = config.open_data(torch.device("cpu")).load()
    config = config.resolve(data)
    data.captions = SimpleNamespace(vocabulary=config.words, length=2, read=lambda number, draw: [
        number, draw.randrange(10**9)])
    seen, run = [], root.start_run(config, torch.device("cpu"))
    monkeypatch.setattr(root, "descend", lambda run, losses, *batch: losses(run, *batch))
    run.process.losses = lambda model, x_0, t, y, noise, loss: seen.append(y)
    for share in (slice(0, 6), slice(0, 2), slice(2, 6)):
        monkeypatch.setattr(text.train.parallel, "share", lambda count, share=share: share)
        learn(run, data, 3, text.train)
    assert torch.equal(seen[0], torch.cat(seen[1:])) and seen[0].shape == (6, 2)
    empty = (seen[0] == len(config.words)).all(1)
    assert 0 < empty.sum() < 6 and len(seen[0][~empty][:, 1].unique()) == 6 - empty.sum()


# The ruler


def test_a_share_and_its_interval():
    """As statsmodels' proportion_confint(9, 10, method="wilson") has it."""
    assert wilson(torch.tensor([True] * 9 + [False])) == pytest.approx((0.9, 0.5958, 0.9821), abs=2e-4)
    assert wilson(torch.ones(500))[1:] == pytest.approx((0.99238, 1.0), abs=1e-4)


def test_swapped_sentences_have_the_same_words():
    assert len(swaps()) > 20
    looks, swapped, parts = ask_swapped(split_characters(False).tolist(), 40, random.Random(0))
    for a, b, changed in zip(looks.tolist(), swapped.tolist(), parts.tolist(), strict=True):
        assert [i for i in range(4) if a[i] != b[i]] == changed
        said = [Counter(words.split()[0] for part, k in zip(PARTS, look, strict=True)
                        for words in LOOKS["english"][part][k]) for look in (a, b)]
        assert said[0] == said[1]


@pytest.mark.parametrize("frames", [8, 1])
def test_frames_are_read_and_compared(frames, monkeypatch):
    monkeypatch.setattr(sprites, "load_images", load_sprites)
    numbers, kinds = torch.tensor([700, 3, 1295]), torch.tensor([2, 0, 1])
    reader = Reader()
    clips = make_clips(numbers, (32, 32))[torch.arange(3), kinds].movedim(1, 2)[:, :, :frames]
    shown = reader.read(clips, kinds.flip(0))
    assert shown[0].shape == (3, frames, 4) and torch.equal(shown[0], parts_of(numbers)[:, None].expand(-1, frames, -1))
    assert torch.equal(shown[1], kinds)
    if frames == 1:  # an image that belongs to two kinds
        reader.gallery[3, 1, 5] = reader.gallery[3, 0, 0]
        assert reader.read(clips, torch.tensor([1, 1, 2]))[1].tolist() == [2, 1, 1]
    asked = parts_of(torch.tensor([700, 4, 1295])), torch.tensor([2, 0, 0])
    found = {name: which.tolist() for name, which in compare(shown, asked).items()}
    assert found == {"body": [True] * 3, "trousers": [True] * 3, "top": [True] * 3, "hair": [True, False, True],
                     "action and direction": [True, True, False], "all": [True, False, False]}


def test_the_weights_that_come_along_know_all_captions():
    path = text.draw.CHECKPOINTS[-1]
    config = load_checkpoint(path, (TextConfig,))["config"]
    assert (list(config.words), config.length) == sprite_words() and config.image_size == (8, 64, 64)
    assert path.stat().st_size < 8e6 and (path.parent / config.vae).is_dir()
    assert read_prompt("蓝色头发，红色上衣，向右挥砍", config)[11] < read_prompt("purple hair", config)[2] == 99


# Further wordings, and files


def test_looks_of_a_character_are_the_rulers():
    numbers = [0, 1, 6, 36, 216, 700, 1295]
    assert [look_of(number) for number in numbers] == parts_of(torch.tensor(numbers)).tolist()


@pytest.mark.parametrize("language, said", [("english", {"walks left", "walking to the left", "walks facing left"}),
                                            ("chinese", {"向左走", "朝左行走", "面向左走"})])
def test_a_caption_that_would_say_nothing_says_what_is_done(language, said):
    """And in Chinese the direction comes before the action."""
    found = set()
    for seed in range(300):
        draw = random.Random(seed)
        draw.random = iter([0.4, *[0.9] * 5]).__next__  # leave out something, and then each part
        found.add(sprite_caption([0, 1, 2, 3], KINDS.index(("walk", "left")), draw, language=language))
    assert said < found
    assert all("left" in text or re.search("[向朝]左行?走$", text) for text in found)


def test_a_byte_order_mark_is_no_part_of_a_caption(folder):
    """As some editors write it."""
    (folder / "0.txt").write_bytes(b"\xef\xbb\xbf" + b"a red square")
    (folder / "1.txt").unlink()
    row = json.dumps({"file_name": "1.png", "text": "blue square"})
    (folder / "metadata.jsonl").write_text(row, "utf-8-sig")
    assert CaptionedFolder(folder).captions == CAPTIONS


# The whole ruler, with a model that draws what is said but for the mistakes it is told to make


class Told:
    """Stands for the sentences, the model and the reader: looks (4) and kind are the words, the clip and what is read
    of it. mistakes: for each call of `read`, a function that spoils looks (N, 2 frames, 4) and kinds (N,)."""

    def __init__(self, monkeypatch, mistakes):
        self.mistakes, self.said = iter(mistakes), []
        for name, value in dict(sentences=self.sentences, draw_words=lambda model, config, words: words,
                                pair_caption=lambda pair, draw, whole: pair, read_prompt=lambda pair, config: [
                                    number for looks, kind in pair for number in (*looks, kind)]).items():
            monkeypatch.setattr(text.score, name, value)

    def sentences(self, looks, kinds, config, draw):
        self.said += [(tuple(look), draw.random()) for look in looks.tolist()]
        return torch.cat([looks, kinds[:, None]], dim=1)

    def read(self, words, asked):
        looks, kinds = words[:, None, :4].repeat(1, 2, 1), words[:, 4].clone()
        assert looks.shape == (20, 2, 4)
        next(self.mistakes)(looks, kinds)
        return looks, kinds


def wrong(columns):
    return {title: {name: (~right).nonzero().flatten().tolist() for name, right in column.items()}
            for title, column in columns.items()}


def test_every_figure_of_the_ruler(monkeypatch):
    looks, swapped, parts = (torch.tensor([row] * 20) for row in ([0, 1, 2, 3], [3, 1, 2, 0], [0, 3]))
    monkeypatch.setattr(text.score, "ask_swapped", lambda *_: (looks, swapped, parts))

    def first(looks, kinds):
        looks[0, 1, 3] += 1
        kinds[1] += 1

    def again(looks, kinds):
        looks[0, 1, 3] += 1  # the same mistake
        looks[2, 0, 2] += 1
        kinds[3] += 1

    def seen(looks, kinds):
        looks[5, :, 1] += 1

    def one(looks, kinds):
        looks[0, 1, 3] += 1
        looks[1, :, 2] += 1  # no part of the swap

    def other(looks, kinds):
        looks[2, 0, 0] += 1
        looks[3] = torch.tensor([0, 1, 2, 3])  # as if nothing was swapped

    told = Told(monkeypatch, [first, again, seen, one, other])
    assert wrong(text.score.score(None, None, told, 20)) == {
        "held out": {"body": [], "trousers": [], "top": [], "hair": [0], "action and direction": [1], "all": [0, 1],
                     "the same in other words": [1, 2, 3], "two colours swapped": [0, 2, 3]},
        "seen": {"body": [], "trousers": [5], "top": [], "hair": [], "action and direction": [], "all": [5]}}
    groups = [told.said[start:start + 20] for start in range(0, 100, 20)]
    known = {train: {tuple(look_of(number)) for number in split_characters(train).tolist()} for train in (True, False)}
    for group, train in zip(groups[:3], (False, False, True), strict=True):
        assert {look for look, _ in group} <= known[train]
    (a, x), (b, y), (_, one), (_, other) = (zip(*group, strict=True) for group in (*groups[:2], *groups[3:]))
    assert a == b and not {*x} & {*y} and one == other and len({*one}) == 20  # in other words, and in the same


def test_every_figure_of_two_sprites(monkeypatch):
    def spoiled(looks, kinds):
        looks[1, 0, 2] += 1

    def right(looks, kinds):
        pass

    told = Told(monkeypatch, [spoiled, right, right, spoiled])

    def draw_words(model, config, words):
        words[0] = words[0].roll(5)  # each figure where the other one should be
        return words

    monkeypatch.setattr(text.score, "draw_words", draw_words)
    assert wrong(text.score.score_pairs(None, None, told, 20)) == {
        "held out": {"left figure, all": [0, 1], "right figure, all": [0], "both figures, all": [0, 1],
                     "on their sides": [0]},
        "seen": {"left figure, all": [0], "right figure, all": [0, 1], "both figures, all": [0, 1],
                 "on their sides": [0]}}


def test_real_clips_are_of_what_they_say(monkeypatch):
    """Each pixel says the character, its kind and the frame."""
    numbers, kinds, frames = torch.meshgrid(torch.arange(296), torch.arange(9), torch.arange(8), indexing="ij")
    images = torch.stack([numbers // 2, 10 * kinds + numbers % 2, frames], dim=-1).flatten(0, 2).byte()
    monkeypatch.setattr(text.score, "load_images", lambda name, folder, train, size, channels: (
        SimpleNamespace(images=images[:, :, None, None].expand(-1, -1, *size)) if not train else None))
    config = TextConfig(image_size=(3, 2, 4), channels=3)
    clips, looks, kinds = text.score.real_clips(config, 40, random.Random(0), "cpu")
    assert clips.shape == (40, 3, 3, 2, 4) and (clips == clips[..., :1, :1]).all()
    high, low, frames = clips[..., 0, 0].long().unbind(1)                                              # each (40, 3)
    assert torch.equal(parts_of(torch.from_numpy(split_characters(False))[2 * high + low % 10]),
                       looks[:, None].expand(-1, 3, -1))
    assert torch.equal(low // 10, kinds[:, None].expand(-1, 3)) and len(kinds.unique()) > 5
    assert torch.equal(frames, frames[:, :1] + torch.arange(3)) and frames[:, 0].unique().tolist() == [*range(6)]


# Grids and pictures


def test_the_columns_of_a_grid_are_captions_of_all_data(monkeypatch):
    seen = []
    data = SimpleNamespace(labels=torch.arange(91), words=lambda numbers, seeds: torch.stack(
        [numbers, torch.tensor(seeds)], dim=1))
    run = SimpleNamespace(ema="average", config=SimpleNamespace(to_images=lambda x: x + 1), data=data)
    monkeypatch.setattr(root, "sample", lambda *args: seen.append(args) or iter([7, 8]))
    monkeypatch.setattr(text.train, "save_grid", lambda *args: seen.append(args))
    text.train.show(run, "grid.png", lambda: False)
    (model, config, words), written = seen
    assert model == "average" and config is run.config and written == ("grid.png", 9)
    assert words.tolist() == [[number, number] for number in range(0, 91, 10)] * 6
    text.train.show(run, "grid.png", lambda: True)
    assert len(seen) == 3  # nothing is written once it shall stop


@pytest.mark.parametrize("flags, name, where, size, frames", [
    ([], "samples.gif", "column", (2 * 58 + 2, 3 * 58 + 2), 5),
    (["--strip"], "strip.png", "row", (5 * 58 + 2, 6 * 58 + 2), 1)])
def test_clips_are_animated_or_stand_in_a_row(call, tmp_path, monkeypatch, flags, name, where, size, frames):
    config = TextConfig(image_size=(5, 8, 8), patch_size=(1, 4, 4), channels=3, num_classes=2, words=("a", "b"),
                        length=2, example="a", hidden_size=8, depth=1, num_heads=2, text_depth=1, sample_steps=1)
    save_checkpoint(tmp_path / "model.pth", config, 1, 1.0, config.build_model().state_dict())
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(text.draw, "draw_states", lambda model, config, labels, count: (
        seen.append(labels), torch.zeros(1, 6, 3, 5, 8, 8, dtype=torch.uint8).add_(torch.arange(5).view(
            5, 1, 1).byte()))[1])
    code, out, err = call(text.draw, "b", "a b", "--count", 3, "--checkpoint", "model.pth", *flags, "--device", "cpu")
    assert code == 0 and out.startswith(f"{where} 1: b\n{where} 2: a b\n{name}: 6 clips of 5 frames"), err
    assert seen == [[[1, 2], [0, 1]]]
    with Image.open(name) as image:
        assert image.size == size and getattr(image, "n_frames", 1) == frames
    code = call(text.draw, "b", "a b", "--count", 3, "--checkpoint", "model.pth", *flags, "--out", "a.jpg")[0]
    assert code == (0 if flags else 1)  # a JPEG stands still
    flags = ["--checkpoint", "model.pth", "--negative", "a", "--guidance"]
    for guidance in (0, 1):
        assert_refused(call(text.draw, "b", *flags, guidance), f"does nothing at guidance {guidance}")


def test_words_that_are_learned_twice_are_refused():
    with pytest.raises(UserError, match="words must be strings that all differ"):
        TextConfig(words=("a", "b", "a"))


def test_patches_of_images_and_of_clips():
    """A clip's is a quarter of each side, an image's has its one frame; an image's size may be given without it."""
    for size, patch in (((1, 8, 12), (1, 2, 3)), ((8, 8, 12), (2, 2, 3)), ((1, 2, 8), (1, 1, 2))):
        data = SimpleNamespace(shape=(3, *size), settings=dict(image_size=size, channels=3))
        assert TextConfig().resolve(data).patch_size == patch
    assert TextConfig(image_size="8x12", patch_size="2x3").patch_size == (1, 2, 3)
    assert TextConfig(image_size="8x12").image_size == (1, 8, 12)


def test_how_the_text_encoder_starts():
    """As `DiT` does: an embedding's numbers, and blocks that are the identity."""
    torch.manual_seed(0)
    network = TextDiT((1, 8, 8), (1, 4, 4), 3, num_classes=9, hidden_size=64, num_heads=2, depth=1, length=3)
    assert network.pool.weight.std().item() == pytest.approx(0.02, rel=0.05) and not network.pool.bias.any()
    assert not any(block.modulation[1].weight.any() for block in (*network.blocks, *network.encoder.blocks))


def test_blocks_are_steered_by_all_words(network):
    """By their mean, beside the time."""
    torch.nn.init.eye_(network.pool.weight)
    torch.nn.init.zeros_(network.pool.bias)
    t, y = torch.tensor([3, 500]), torch.tensor([[1, 2, 3, 9], [4, 5, 9, 9]])
    c, words, *_ = network.condition(t, y)
    assert words.shape == (2, 4, 16)
    torch.testing.assert_close(c - network.time_embedding(t), words.mean(dim=1), atol=1e-5, rtol=1e-4)


def test_a_prompt_may_be_as_long_as_the_longest_caption():
    assert read_prompt("a purple hair and white", prompt_config()) == [0, 3, 2, 1, 5]


def test_a_strange_word_is_named_once():
    with pytest.raises(UserError) as error:
        read_prompt("dragon, cat, dragon", prompt_config())
    assert str(error.value).count("'dragon'") == 1 and "'cat'" in str(error.value)
