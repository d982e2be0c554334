"""Every claim of a finished run: its interval in units of the smallest effect that matters.

python viz/verdicts.py runs/cities --out verdicts.pdf --width page
"""

import argparse
from pathlib import Path

from subjattn import open_run
from subjattn.plots.verdicts import plot_claims


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="folder of a finished study")
parser.add_argument("--style", help="prompt style; by default all")
parser.add_argument("--out", type=Path, default=Path("verdicts.html"), help=".html, .svg, .pdf or .png")
parser.add_argument("--width", choices=["column", "page"], help="of a paper, instead of a screen's")
args = parser.parse_args()

run = open_run(args.run)
claims = run.summary["claims"]
if args.style:
    claims = [claim | {"styles": {args.style: claim["styles"][args.style]}} for claim in claims]
print(plot_claims(claims).save(args.out, args.width))
