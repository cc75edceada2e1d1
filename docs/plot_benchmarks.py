"""Draws docs/lengths.png: how the time of Stage II grows with the clip, in segments and as one window.

Run `python docs/plot_benchmarks.py RECORD.json [PICTURE]` on a record that `swifti2v-bench full-sequence --json` wrote;
it wants matplotlib, of the extra `train`.
"""

import sys
from pathlib import Path

from swifti2v.benchmarks.baseline import read_record
from swifti2v.benchmarks.plot import plot_lengths

TARGET = Path(__file__).with_name("lengths.png")

if __name__ == "__main__":
    plot_lengths(read_record(Path(sys.argv[1])), Path(sys.argv[2]) if len(sys.argv) > 2 else TARGET)
