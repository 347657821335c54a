"""Every command and flag of `qwenvl`, read without jax, so that `--help` and a mistyped option answer at once."""

import argparse

from qwenvl_jax.cli import eval as eval_verb
from qwenvl_jax.cli.errors import BAD_INPUT
from qwenvl_jax.train import options as train_options

# Of the commands that compile.
_KEPT = (
    "Compiled programs are kept for the next run in ~/.cache/qwenvl_jax (in XDG_CACHE_HOME, if it is set). "
    "JAX_COMPILATION_CACHE_DIR=DIR keeps them elsewhere, JAX_ENABLE_COMPILATION_CACHE=0 nowhere."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(BAD_INPUT, f"{self.prog}: {message}\nSee '{self.prog} --help'.\n")


class _Media(argparse.Action):
    """Collects --image and --video into one list, in the order of the command line."""

    def __call__(self, parser, namespace, value, option_string=None):
        kind = option_string.lstrip("-")
        namespace.media = [*(namespace.media or []), (kind, value)]


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="qwenvl", description="Qwen2-VL and Qwen2.5-VL in JAX.")
    parser.add_argument("--debug", action="store_true", help="show warnings, logs and tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, epilog=None):
        sub = commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
        # SUPPRESS: without it the default here would overwrite `qwenvl --debug generate`.
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return sub

    p = command("generate", "Answer one conversation; the text streams to stdout.", _KEPT)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the question")
    source.add_argument("--messages", metavar="FILE", help="messages or an OpenAI request as JSON; - reads stdin")
    p.add_argument("--tools", metavar="FILE", help="descriptions of tools as JSON, in OpenAI's form")
    for kind in ("image", "video"):
        p.add_argument(
            f"--{kind}",
            action=_Media,
            dest="media",
            metavar="F",
            help="file, URL, or demo:NAME for a sample that comes with the package; repeatable, order is kept",
        )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    p.add_argument("--distributed", action="store_true", help="this is one of several processes, as on a pod's hosts")
    _model_options(p)

    p = command("chat", "Talk to a model about images and videos.", _KEPT)
    _model_options(p)
    p.set_defaults(distributed=False)

    p = command("train", "Fine-tune a model. The same command goes on with a run that was stopped.", _KEPT)
    p.add_argument("config", nargs="?", metavar="FILE.toml", help="the keys below, with _ for -; flags win")
    train_options.add_arguments(p)

    p = command("eval", "Answer questions and score the answers.", _KEPT)
    eval_verb.add_arguments(p)

    p = command("plot", "Draw the metrics of training runs.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    p.add_argument("-o", "--output", default="loss.png", metavar="FILE.png", help="default: loss.png")

    p = command("convert", "Turn a Hugging Face checkpoint into an Orbax one, or back.")
    p.add_argument("src", metavar="SRC", help="checkpoint directory or hub id")
    p.add_argument("dst", metavar="DST", help="directory to create")
    p.add_argument("--to", choices=("orbax", "hf"), required=True)
    p.add_argument("--layout", choices=("hub", "nested"), help="tensor names, with --to hf (default: hub)")

    p = command("plan", "Compile for a TPU slice or GPUs that are not there: does it fit, how fast at best?")
    p.add_argument("--model", required=True, metavar="NAME_OR_DIR", help="a preset such as qwen2.5-vl-7b, or weights")
    p.add_argument("--target", required=True, help="v5e-8, v6e-4, v5p-128, h200, h100x8, …; with --search v6e or h100")
    p.add_argument("--task", choices=("decode", "prefill", "vision", "train"), default="decode", help="default: decode")
    p.add_argument("--batch", type=int, metavar="N", help="rows (default: 1)")
    p.add_argument("--context", type=int, metavar="N", help="slots or tokens a row (default: 4096)")
    p.add_argument("--images", type=int, metavar="N", help="of vision and train, in all (default: 1)")
    p.add_argument("--pixels", type=int, metavar="N", help="of each image (default: 1280·28·28)")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--full", action="store_true", default=None, help="train all weights, which is the default")
    g.add_argument("--lora", type=int, nargs="?", const=16, metavar="RANK", help="train adapters (default rank: 16)")
    p.add_argument("--mesh", metavar="DxFxT", help="chips along data, fsdp and tensor; default: as suits the task")
    p.add_argument("--search", action="store_true", help="find the smallest slice that holds it, and its best mesh")
    p.add_argument("--json", action="store_true")

    p = command("info", "Say what a checkpoint is, reading only its headers.")
    text = "checkpoint directory, or a preset such as qwen2.5-vl-7b (default: demo)"
    p.add_argument("checkpoint", nargs="?", default="demo", metavar="CKPT", help=text)
    p.add_argument("--json", action="store_true")

    p = command("verify", "Compare this model with the PyTorch one, stage by stage, on your weights.", _KEPT)
    p.add_argument("checkpoint", metavar="CKPT", help="Hugging Face checkpoint directory")
    p.add_argument("--image", metavar="F", required=True, help="picture to compare on")
    return parser


def _model_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default="demo", metavar="DIR_OR_ID", help="directory or hub id (default: demo)")
    p.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), help="default: the checkpoint's")
    p.add_argument("--mesh", metavar="DxFxT", help="devices along data, fsdp and tensor, as 1x1x8 (default: one)")
    p.add_argument("--system", metavar="TEXT", help="system prompt")
    g = p.add_argument_group("sampling", "Defaults come from the checkpoint's generation_config.json.")
    g.add_argument("--max-new-tokens", type=int, metavar="N")
    g.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    g.add_argument("--top-p", type=float, metavar="P")
    g.add_argument("--top-k", type=int, metavar="K")
    g.add_argument("--min-p", type=float, metavar="P")
    g.add_argument("--repetition-penalty", type=float, metavar="R")
    g.add_argument("--presence-penalty", type=float, metavar="R")
    g.add_argument("--frequency-penalty", type=float, metavar="R")
    g.add_argument("--seed", type=int)
    g.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    g = p.add_argument_group("images and videos", "For all of them; what an item of --messages sets wins.")
    g.add_argument("--min-pixels", type=int, metavar="N", help="of an image, or of each frame")
    g.add_argument("--max-pixels", type=int, metavar="N")
    g.add_argument("--resized-height", type=int, metavar="N", help="instead of the bounds, with --resized-width")
    g.add_argument("--resized-width", type=int, metavar="N")
    g.add_argument("--total-pixels", type=int, metavar="N", help="of all frames of a video, taken in pairs")
    g.add_argument("--fps", type=float, help="frames sampled a second of video")
    g.add_argument("--min-frames", type=int, metavar="N", help="at least so many, whatever --fps gives")
    g.add_argument("--max-frames", type=int, metavar="N")
    g.add_argument("--nframes", type=int, metavar="N", help="frames sampled in all, instead of --fps")
    g.add_argument("--video-start", type=float, metavar="SECONDS")
    g.add_argument("--video-end", type=float, metavar="SECONDS")
    g = p.add_argument_group("prompt")
    flag = dict(action="store_true", default=None)
    g.add_argument("--add-vision-id", **flag, help="number the images and videos")
    g.add_argument("--allow-control-tokens", **flag, help="let tokens such as <|im_end|> that are typed in a text act")
