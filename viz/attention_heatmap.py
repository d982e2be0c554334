"""Attention to the subject by layer and head, a panel per arm and a difference, from a finished run.

python viz/attention_heatmap.py runs/cities --style list --difference unknown known --out attention.html
"""

import argparse
from pathlib import Path

import xarray as xr

from subjattn import plot_attention


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="folder of a finished study")
parser.add_argument("--style", help="prompt style; by default the study's first")
parser.add_argument("--difference", nargs=2, metavar=("A", "B"), help="add a panel of arm A minus arm B")
parser.add_argument("--out", type=Path, default=Path("attention.html"))
args = parser.parse_args()

measures = xr.load_dataset(args.run / "measures.nc")
attention = measures["attention_to_subject"].sel(style=args.style or measures["style"].values[0])
plot_attention(attention, args.difference and tuple(args.difference)).write_html(args.out)
print(args.out)
