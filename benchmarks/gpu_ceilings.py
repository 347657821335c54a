"""The ceilings of the card: reading and copying its memory, and a bfloat16 matmul.

python benchmarks/gpu_ceilings.py --output FILE
"""

import argparse
from functools import partial

import jax
from common import Report, ceiling, copy_rates, device_name, product_rates, read_rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--small", action="store_true", help="small arrays, for a rehearsal")
    parser.add_argument("--output", help="file to which results are appended as JSON lines")
    args = parser.parse_args()
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[args.platform])
    device = {"cpu": "cpu", "gpu": "cuda"}[args.platform]
    report = Report("ceilings", args.output, benchmark="ceilings", device=device_name())
    kinds = {"read": read_rates, "copy": copy_rates, "product": partial(product_rates, dtype="bfloat16")}
    for name, kind in kinds.items():
        rates = {form: ceiling({form: measure}) for form, measure in kind(device, small=args.small).items()}
        best = max(rates.values())
        rate_list = ", ".join(f"{form} {rate / 1e12:.3f}" for form, rate in rates.items())
        report.note(
            f"{name}: {rate_list} T{'FLOP' if name == 'product' else 'B'}/s", ceiling=name, best=best, forms=rates
        )


if __name__ == "__main__":
    main()
