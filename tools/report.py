"""Write a run's report.html again from the files in its output folder: python -m tools.report OUTPUT_DIR."""

from pathlib import Path

from cogvideox import flags, report
from cogvideox.console import BAD_OUTPUT, fail
from cogvideox.files import at_home

FILES_OF_A_RUN = ("run.json", "metrics.jsonl", "status.json", "dataset.json")  # whatever of them a stopped run has written


def main():
    """The command line."""
    parser = flags.new_parser(__doc__)
    parser.usage = "python -m tools.report OUTPUT_DIR"
    parser.add_argument("output_dir", help="as in --output_dir of the trainer")
    options = parser.parse_args()
    folder = Path(at_home(options.output_dir))
    if not folder.is_dir():
        flags.refuse(parser, [f"{folder}: no such folder; give the --output_dir of a run"])
    if not any((folder / name).exists() for name in FILES_OF_A_RUN):
        flags.refuse(parser, [f"{folder}: holds no run ({', '.join(FILES_OF_A_RUN)}); give the --output_dir of a run"])
    if problem := report.write_report(folder):
        fail(BAD_OUTPUT, problem)
    print(folder / report.NAME)


if __name__ == "__main__":
    main()
