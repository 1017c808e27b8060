"""Write a run's report.html again from the files in its output folder: python -m tools.report OUTPUT_DIR."""

import argparse
from pathlib import Path

from cogvideox import report


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", help="as in --output_dir of the trainer")
    options = parser.parse_args()
    folder = Path(options.output_dir).expanduser()
    if not folder.is_dir():
        parser.exit(2, f"ERROR[2]: {folder}: no such folder; give the --output_dir of a run\n")
    if problem := report.write_report(folder):
        parser.exit(4, f"ERROR[4]: {problem}\n")
    print(folder / report.NAME)


if __name__ == "__main__":
    main()
