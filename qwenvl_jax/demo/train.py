"""Trains the demo on records drawn as they are needed, with the trainer that everyone uses.

    python -m qwenvl_jax.demo.train RUN --assets DIR [--steps N] [--rows N] [--dtype bfloat16]

Stopped and started again with the same arguments, it goes on; with more steps, it goes further. The result is
RUN/final, which `qwenvl convert RUN/final DIR --to hf` writes as the Hugging Face checkpoint in this package.
"""

import argparse
import json
from pathlib import Path

import jax

from qwenvl_jax.config import Config, TextConfig, VisionConfig, read_json
from qwenvl_jax.demo.assets import find_assets
from qwenvl_jax.demo.render import Scenes
from qwenvl_jax.demo.score import LONGEST, questions
from qwenvl_jax.demo.tokenizer import special_ids, write_processor
from qwenvl_jax.evaluate import Evaluator
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.model.qwenvl import init
from qwenvl_jax.params.checkpoint import load, save
from qwenvl_jax.train.data import Dataset
from qwenvl_jax.train.loop import train
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.records import PackShape
from qwenvl_jax.train.step import GROUPS
from qwenvl_jax.types import Model

TURNS = 4  # questions about a picture; reading the picture costs as much as answering them


def demo_config() -> Config:
    """Qwen2.5-VL's architecture, small: four million parameters. Windows and full attention take turns."""
    ids = special_ids()
    return Config(
        family="qwen2_5_vl",
        text=TextConfig(
            vocab_size=896,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=48,
            max_position_embeddings=4096,
            # Columns have the slowest frequencies; with θ = 10,000 a step to the next column would turn none of
            # them by more than 0.003 radians.
            rope_theta=10.0,
            mrope_section=(6, 9, 9),
            tie_word_embeddings=True,
        ),
        vision=VisionConfig(
            depth=4,
            hidden_size=128,
            intermediate_size=384,
            out_hidden_size=192,
            num_heads=4,
            fullatt_block_indexes=(1, 3),
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        eos_token_id=ids["<|im_end|>"],
        dtype="float32",
    )


def demo_options(output, **changes) -> TrainOptions:
    """How it was trained; the model card says for how many steps."""
    return TrainOptions(
        output=str(output),
        tokens=192,
        patches=256,
        optimizer="muon",
        learning_rate=3e-3,
        schedule="constant",
        weight_decay=0.02,
        remat=False,
        save_every=250,
        eval_every=1000,
        keep=1,
        best="overall",
    ).replace(**changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument("--assets", help="where fonts, emoji and tables are; see qwenvl_jax/demo/assets.py")
    parser.add_argument("--start", help="RUN/final of an earlier run to start from, or of `qwenvl_jax.demo.pretrain`")
    parser.add_argument("--rows", type=int, default=20, help="of a batch; each is about two conversations")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--cooldown", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="to compute in")
    parser.add_argument("--weights", type=json.loads, help='of the tasks, as JSON: {"ocr": 2, "name": 1}')
    parser.add_argument("--easy", type=float, default=0.0, help="share of easy pictures, for a start")
    parser.add_argument("--freeze", nargs="*", default=[], choices=GROUPS, help="what stays as it is")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--devices", type=int, default=1, help="that share a batch")
    parser.add_argument("--questions", type=int, default=64, help="of every task, in each evaluation on the way")
    args = parser.parse_args()

    assets = find_assets(args.assets)
    config = demo_config()
    args.run.mkdir(parents=True, exist_ok=True)
    files = write_processor(args.run / "processor")
    processor, generation = Processor.from_dir(files, config), read_json(files / "generation_config.json")
    params = load(args.start).params if args.start else jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    model = Model(config, params, processor, generation)
    options = demo_options(
        args.run,
        model=args.start or "",
        rows=args.rows,
        lanes=-(-args.rows * 6 // 5),
        steps=args.steps,
        cooldown=args.cooldown,
        warmup=args.warmup,
        freeze=tuple(args.freeze),
        dtype=args.dtype,
        mesh_data=args.devices,
    )
    shape = PackShape(options.rows, options.tokens, options.lanes, options.patches)
    # One record in some thousands is longer than a row: four questions, each with three boxes in its answer.
    data = Dataset(
        Scenes(assets, turns=TURNS, easy=args.easy, weights=args.weights),
        processor,
        shape,
        shuffle=False,
        on_error="skip",
    )
    evaluate = Evaluator(model, questions(assets, args.questions), batch=64, max_new_tokens=LONGEST)
    result = train(model, data, options, evaluate=evaluate, donate=True)
    data.close()
    if result.signal is not None:
        print(f"stopped after step {result.step}; the same command goes on from there")
        return
    final = args.run / "final"
    save(model._replace(params=result.params), final, files_from=files)
    print(f"model of step {result.step}: {final}")


if __name__ == "__main__":
    main()
