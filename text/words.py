"""Sentences as numbers: how a caption is split into words, and which words a model knows."""

from support.commands import UserError

import difflib
import re
import unicodedata

MOST_WORDS = 256  # of a caption
# A word is a run of letters and digits, or one Chinese character; whatever else there is separates words.
CHINESE = "\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[{CHINESE}]|[^\W_{CHINESE}]+")


def split_words(text):
    """The words of a text in any language, lower case, a list: "Purple hair, 向左走" is purple, hair, 向, 左, 走."""
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def number_words(words, vocabulary, length):
    """The numbers of `words` in a dict, followed by the null label, len(vocabulary): a list of `length` ints."""
    return [vocabulary[word] for word in words] + [len(vocabulary)] * (length - len(words))


def read_prompt(text, config):
    """The words of a prompt as `number_words`, for a model of `config`. Raises `UserError` for a prompt without a word,
    with words that the model has not learned, or with more words than its longest caption."""
    words, known = split_words(text), config.vocabulary
    such = f"such as {config.example!r:.120}"
    if not words:
        raise UserError(f"the prompt {text!r:.80} holds no word: say what to draw, {such}")
    strange = [word for word in dict.fromkeys(words) if word not in known]
    if strange:
        near = [", ".join(difflib.get_close_matches(word, known, 3)) for word in strange[:5]]
        said = ", ".join(f"{word!r:.40}{f' (near it: {found})' if found else ''}"
                         for word, found in zip(strange, near, strict=False))
        raise UserError(f"the model has not learned {said}{' ...' if len(strange) > 5 else ''}: its captions are "
                        f"{such}")
    if len(words) > config.length:
        raise UserError(f"the prompt has {len(words):,} words, and the longest caption that the model has learned "
                        f"{config.length}: make it shorter")
    return number_words(words, known, config.length)
