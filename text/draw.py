"""Draws what sentences say.

    python -m text.draw "purple hair, white shirt, green trousers, walks left" "蓝色头发，红色上衣，向右挥砍" --count 4
"""

from support.commands import UserError, run, some_path, some_word
from support.settings import say_default

from pathlib import Path

import torch
from torch import nn

from inference import check_out, draw_states, load_for_sampling, sampling_parser
from text.config import TextConfig
from text.words import read_prompt
from video.draw import save_clips

# The model just trained, else the weights that come with the repository
CHECKPOINTS = (Path("run_text/model.pth"), Path(__file__).parents[1] / "weights" / "text.pth")


class Against(nn.Module):
    """A `TextDiT` that is asked for the caption `negative` (L,) in place of an empty one: guidance then leads away from
    that caption."""

    def __init__(self, model, negative):
        super().__init__()
        self.model, self.null_label = model, model.null_label
        self.negative = torch.tensor(negative, device=next(model.parameters()).device)

    def forward(self, x, t, y):
        return self.model(x, t, torch.where((y == self.null_label).all(1, keepdim=True), self.negative, y))


def text_parser(description):
    """The flags of every command that draws from sentences."""
    parser = sampling_parser(description, TextConfig)
    parser.set_defaults(checkpoint=next((path for path in CHECKPOINTS if path.is_file()), CHECKPOINTS[-1]))
    say_default(parser, ["checkpoint"], "run_text/model.pth, else weights/text.pth")
    return parser


def parse_args():
    parser = text_parser("Draws what sentences say, in a column each: pictures, or clips. Settings that are not "
                         "given here are the model's own.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw, a sentence")
    parser.add_argument("--count", type=int, default=4, help="how many of each (default: 4)")
    parser.add_argument("--negative", type=some_word, metavar="PROMPT", help="what not to draw: guidance leads away "
                        "from this sentence instead of from an empty one")
    parser.add_argument("--strip", action="store_true", help="draw the frames of each clip, from left to right")
    parser.add_argument("--out", type=some_path, help="the picture to write (default: samples.gif for clips, "
                        "samples.png for images, strip.png with --strip)")
    return parser.parse_args()


def main():
    args = parse_args()
    model, config = load_for_sampling(args, (TextConfig,))
    prompts, frames = [read_prompt(prompt, config) for prompt in args.prompts], config.image_size[0]
    if args.negative is not None:
        if config.guidance in (0, 1):
            raise UserError(f"--negative does nothing at guidance {config.guidance:g}: add --guidance 2")
        model = Against(model, read_prompt(args.negative, config))
    check_out(args, config, prompts, frames, frames > 1 and not args.strip)
    clips = draw_states(model, config, prompts, args.count)[-1]
    for number, prompt in enumerate(args.prompts, 1):
        print(f"{'row' if args.strip else 'column'} {number}: {prompt}")
    save_clips(args, clips, config, prompts)


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
