"""Settings as the fields of a dataclass: their flags, their bounds, and what a user has given."""

from support.commands import UserError, some_word
from support.sizes import LARGEST

import argparse
import dataclasses
import difflib
from pathlib import PurePath


def flag(default, help, low=None, high=None, choices=None, read=None):
    """A field of a class of settings that is also a command-line flag. low, high: inclusive bounds. read: makes a value
    of a word."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, read=read))


class Settings:
    """The base of the settings of a training, a frozen dataclass. Raises `UserError` when a value has the wrong type or
    is out of range."""

    axes, size_words = (2,), "height and width, such as 28x20"  # of an image
    page = ()  # what the page of a run says otherwise; see `record.page.show_run`

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(field, getattr(self, field.name)))
            check_value(field, getattr(self, field.name))
        self.check()

    def check_size(self, name, size):
        """Raises `UserError` unless `size`, the value of the setting `name`, is () or has a number for each axis."""
        if size != () and not (type(size) is tuple and len(size) in self.axes and all(
                type(side) is int and 1 <= side <= LARGEST for side in size)):
            raise UserError(f"{name} is {size!r:.80}, but must be {self.size_words}, each between 1 and {LARGEST}")

    def check_given(self, given):
        """Raises `UserError` when `given`, a dict, holds a setting that a model of these settings does not use."""
        for name in given:
            if name not in self.__dataclass_fields__:
                raise UserError(f"--{name.replace('_', '-')} says nothing to a model of {self.kind}: leave it out")
        if given.get("eta") and (sampler := given.get("sampler", self.sampler)) != "ddim":
            raise UserError(f"--eta is the noise of the ddim sampler, but this draws with {sampler}: add --sampler "
                            "ddim, or leave --eta out")


def plain(field, value):
    """The value of a field as it is kept: "28x20" is (28, 20), a `Path` the string that it stands for."""
    read = field.metadata.get("read")
    return read(value) if read else str(value) if isinstance(value, PurePath) else value


def check_names(given, known):
    """Raises `UserError` when `given` (a dict, or names) holds a setting that is not among the names `known`."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise UserError(f"{name!r:.50} is no setting here" + (f": is {near[0]!r} meant?" if near else
                                                                  f"; there are {', '.join(known)}"))


def check_value(field, value):
    """Raises `UserError` unless `value` has the type of `field` and lies within its bounds or choices."""
    rule = field.metadata
    if type(value) is not field.type and not (field.type is float and type(value) is int):
        raise UserError(f"{field.name} must be of type {field.type.__name__}, not {value!r:.80}")
    if rule.get("choices") and value not in rule["choices"]:
        raise UserError(f"{field.name} is {value!r:.80}, but must be one of {', '.join(rule['choices'])}")
    if field.type in (int, float) and not rule["low"] <= value <= rule["high"]:  # NaN lies nowhere
        raise UserError(f"{field.name} is {value!r:.80}, but must lie between {rule['low']} and {rule['high']}")


def add_flags(parser, of, names=None):
    """Adds a flag to `parser` for each field of a class of settings, or for those in `names`. The flags have no
    default: the namespace holds only what the user gave."""
    for field in dataclasses.fields(of):
        rule = field.metadata
        if "help" in rule and (names is None or field.name in names):
            kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(
                type=rule["read"] or (some_word if field.type is str else field.type), choices=rule["choices"],
                metavar=None if rule["choices"] else "HxW" if rule["read"] else field.type.__name__)
            default = 0 if rule["read"] else "none" if field.default == "" else field.default
            functions = rule["choices"].items() if isinstance(rule["choices"], dict) else ()
            each = "".join(f"; {name}: {(of.__doc__ or '').split(':')[0]}" for name, of in functions)
            parser.add_argument("--" + field.name.replace("_", "-"), **kind, default=argparse.SUPPRESS,
                                help=f"{rule['help']}{each} (default: {default})")


def say_default(parser, names, default):
    """Makes --help name another default for these flags than that of `Config`."""
    for action in parser._actions:
        if action.dest in names:
            action.help = f"{action.help.rpartition(' (default')[0]} (default: {default})"


def given_flags(args, of):
    """The fields of a class of settings (or an object of it) that the user set on the command line, as a dict."""
    return {name: value for name, value in vars(args).items() if name in of.__dataclass_fields__}
