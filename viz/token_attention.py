"""Attention over the tokens of single prompts, arms side by side, subject marked, from a finished run.

python viz/token_attention.py runs/cities --style list --out tokens.html
"""

import argparse
from pathlib import Path

from subjattn import open_run, plot_tokens


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="folder of a finished study")
parser.add_argument("--style", required=True, help="prompt style")
parser.add_argument("--out", type=Path, default=Path("tokens.html"))
args = parser.parse_args()

plot_tokens(open_run(args.run).array("token_attention", "token_attention", args.style)).write_html(args.out)
print(args.out)
