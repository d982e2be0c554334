"""Recovery by patching, layer by position role, a panel per arm, from a finished run.

python viz/patching_heatmap.py runs/cities --style list --out patching.html
"""

import argparse
from pathlib import Path

from subjattn import open_run, plot_patching


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="folder of a finished study")
parser.add_argument("--style", required=True, help="prompt style")
parser.add_argument("--out", type=Path, default=Path("patching.html"))
args = parser.parse_args()

plot_patching(open_run(args.run).array("patching", "patch_effect", args.style)).write_html(args.out)
print(args.out)
