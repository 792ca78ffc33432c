"""Measured servers replayed: `python benchmarks/validation [FOLDER] [-o OUT_FOLDER] [--fit]`; see README.md."""

import argparse
import os
import sys
import time
from pathlib import Path

import pandas as pd
from crossvalidate import cross_validate
from measured import read_folder
from replay import compare, replay
from report import report

import vecsim as sim


def main() -> int:
    parser = argparse.ArgumentParser("python benchmarks/validation", description="Replay measured runs and compare.")
    parser.add_argument("folder", nargs="?", type=Path, help="of measured runs; $VECSIM_DATA/data/groundtruth if left")
    parser.add_argument("-o", "--out", type=Path, default=Path("validation"), help="folder for tables and pictures")
    parser.add_argument("--name", default="vllm-0.15-h100", help="fitted set, one of vecsim.Fit.names()")
    parser.add_argument("--fit", action="store_true", help="fit the constants anew, and on all runs but some")
    chosen = parser.parse_args()
    folder = chosen.folder
    if folder is None:
        if "VECSIM_DATA" not in os.environ:
            parser.error("name a folder of measured runs, or set VECSIM_DATA to the folder that has data/groundtruth")
        folder = Path(os.environ["VECSIM_DATA"]) / "data" / "groundtruth"
    if not folder.is_dir():
        parser.error(f"there is no folder {folder}")
    runs, refused = read_folder(folder)
    if not runs and not refused:
        parser.error(f"there is no measured run (*.json) in {folder}")
    fit = sim.Fit.named(chosen.name)
    for run in runs[:1]:
        replay(run, fit)  # compiles or loads the kernels
    begin = time.perf_counter()
    replays = [replay(run, fit) for run in runs]
    took = time.perf_counter() - begin
    compared = pd.concat([compare(replayed) for replayed in replays]) if replays else pd.DataFrame()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if replays:
        text = report(replays, compared, refused)
        compared.to_csv(chosen.out / "validation.csv", index=False, float_format="%.6g")
    else:
        text = "".join(f"{file}: {reason}\n" for file, reason in refused.items())
    (chosen.out / "validation.md").write_text(text, encoding="utf-8")
    print(text)
    for file, reason in refused.items():
        print(f"not read: {file}: {reason}", file=sys.stderr)
    print(f"{len(runs)} runs replayed in {took:.2f} s; tables and pictures in {chosen.out}", file=sys.stderr)
    if chosen.fit and (fitted := [run for run in runs if not run.overloaded]):
        text = cross_validate(fitted)
        (chosen.out / "fit.md").write_text(text, encoding="utf-8")
        print(text)
    return 0 if replays else 1


if __name__ == "__main__":
    sys.exit(main())
