"""Knock-out of the subject in one layer, window or head at a time, an arm per line or panel, from a finished run.

python viz/knockout.py runs/cities --by layer --style list --out knockout.pdf --width column
"""

import argparse
from pathlib import Path

from subjattn import open_run, plot


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="folder of a finished study")
parser.add_argument("--style", help="prompt style; by default the study's first")
parser.add_argument("--by", choices=["layer", "window", "head"], default="layer", help="as the study measured it")
parser.add_argument("--out", type=Path, default=Path("knockout.html"), help=".html, .svg, .pdf or .png")
parser.add_argument("--width", choices=["column", "page"], help="of a paper, instead of a screen's")
args = parser.parse_args()

run = open_run(args.run)
style = args.style or run.styles[0]
drop = run.array("knockout", f"knockout_drop_by_{args.by}", style)
print(plot(drop).save(args.out, args.width))
