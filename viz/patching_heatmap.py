"""Recovery by patching, from a finished run: layer by position role, or layer by head where heads were patched.

python viz/patching_heatmap.py runs/cities --style list --out patching.pdf --width column
"""

import argparse
from pathlib import Path

from subjattn import open_run, plot


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="folder of a finished study")
parser.add_argument("--style", help="prompt style; by default the study's first")
parser.add_argument("--out", type=Path, default=Path("patching.html"), help=".html, .svg, .pdf or .png")
parser.add_argument("--width", choices=["column", "page"], help="of a paper, instead of a screen's")
args = parser.parse_args()

run = open_run(args.run)
effect = run.array("patching", "patch_effect", args.style or run.styles[0])
print(plot(effect).save(args.out, args.width))
