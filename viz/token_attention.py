"""Attention over the tokens of single prompts, arms side by side, subject marked, from a finished run.

python viz/token_attention.py runs/cities --style list --out tokens.pdf --width page
"""

import argparse
from pathlib import Path

from subjattn import open_run, plot


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="folder of a finished study")
parser.add_argument("--style", help="prompt style; by default the study's first")
parser.add_argument("--out", type=Path, default=Path("tokens.html"), help=".html, .svg, .pdf or .png")
parser.add_argument("--width", choices=["column", "page"], help="of a paper, instead of a screen's")
args = parser.parse_args()

run = open_run(args.run)
tokens = run.array("token_attention", "token_attention", args.style or run.styles[0])
print(plot(tokens).save(args.out, args.width))
