"""Attention to the subject by layer and head, a panel per arm and a difference, from a finished run.

python viz/attention_heatmap.py runs/cities --style list --difference unknown known --out attention.pdf --width page
"""

import argparse
from pathlib import Path

from subjattn import open_run, plot


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="folder of a finished study")
parser.add_argument("--style", help="prompt style; by default the study's first")
parser.add_argument("--difference", nargs=2, metavar=("A", "B"), help="add a panel of arm A minus arm B")
parser.add_argument("--out", type=Path, default=Path("attention.html"), help=".html, .svg, .pdf or .png")
parser.add_argument("--width", choices=["column", "page"], help="of a paper, instead of a screen's")
args = parser.parse_args()

run = open_run(args.run)
style = args.style or run.styles[0]
attention = run.array("attention_to_subject", "attention_to_subject", style)
stands = args.difference and run.significant("attention_to_subject", "attention_to_subject", style, *args.difference)
print(plot(attention, args.difference and tuple(args.difference), stands).save(args.out, args.width))
