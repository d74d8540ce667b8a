"""The command line: ``python -m pyro_flowkit``, or ``pyro-flowkit``. What it does is in command_line/."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from pyro_flowkit.command_line import commands
from pyro_flowkit.command_line.errors import CommandError
from pyro_flowkit.tables.columns import DISCRETE
from pyro_flowkit.tables.errors import TableError
from pyro_flowkit.tables.flow import DEFAULT_LAYERS, FlowSettings
from pyro_flowkit.tables.missing import MISSING
from pyro_flowkit.tables.training import BATCH_SIZE, DEFAULT_SECONDS, LEARNING_RATE

FAILED, INTERRUPTED = 2, 130
MOST_LAYERS, MOST_WIDTH, MOST_BINS, MOST_DRAWS = 100, 4096, 256, 10_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        0, or 2 after an error that is one line on stderr, or 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        args.command(args)
        sys.stdout.flush()
    except (CommandError, TableError) as error:
        words = " ".join(str(error).split())
        print(f"pyro-flowkit: error: {words[0].lower()}{words[1:]}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("pyro-flowkit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    except OSError as error:
        print(f"pyro-flowkit: error: expected to read and write, got {error}", file=sys.stderr)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return FAILED
    except MemoryError:
        print("pyro-flowkit: error: expected more memory than there is", file=sys.stderr)
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyro-flowkit",
        description="Exact densities of tables by spline flows: train one, score rows, draw rows, compare runs.",
    )
    parser.set_defaults(overwrite=False)
    commands_of = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser:
        command = commands_of.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + "."
        )
        command.set_defaults(command=run)
        return command

    _add_fit(add("fit", commands.fit, "train the density of a table and write a run folder"))
    score = add(
        "score",
        commands.score,
        "write the log density (nats, units of the file) of every row of a table",
    )
    score.add_argument("run", metavar="RUN", help="run folder")
    _add_data(score)
    _add_missing(score, MISSING[:2], "an error, or leave them out")
    _add_output(score, "FILE", "CSV file to write (default: stdout)")

    sample = add(
        "sample", commands.sample, "write rows drawn from a density, in the units of its table"
    )
    sample.add_argument("run", metavar="RUN", help="run folder")
    sample.add_argument(
        "-n", "--count", type=_between(1, MOST_DRAWS), default=1000, help="rows (default: 1000)"
    )
    sample.add_argument("--seed", type=_seed, default=0, help="of the draws (default: 0)")
    _add_output(sample, "FILE", "CSV file to write (default: stdout)")

    compare = add("compare", commands.compare, "compare runs on the test rows that they share")
    compare.add_argument("runs", metavar="RUN", nargs="+", help="run folders")

    diagnose = add("diagnose", commands.diagnose, "say in plain words what to make of a run")
    diagnose.add_argument("run", metavar="RUN", help="run folder")
    return parser


def _add_fit(fit: argparse.ArgumentParser) -> None:
    _add_data(fit)
    _add_output(fit, "DIR", "the run folder to write", required=True)
    fit.add_argument("--columns", nargs="+", metavar="NAME", help="columns to use (default: all)")
    fit.add_argument(
        "--exclude", nargs="+", default=[], metavar="NAME", help="columns to leave out"
    )
    fit.add_argument(
        "--discrete",
        choices=DISCRETE,
        default="noise",
        help="columns of few distinct values: noise for integers and an error for others, drop them, or keep them as "
        "if they were continuous (default: noise)",
    )
    _add_missing(fit, MISSING, "an error, leave them out, or fill them in, to train only")
    fit.add_argument("--steps", type=_positive(int), help="training steps (default: by the rows)")
    fit.add_argument(
        "--seconds",
        type=_positive(float),
        help=f"training time (default: none with --steps, otherwise at most {DEFAULT_SECONDS:g})",
    )
    fit.add_argument(
        "--seed", type=_seed, default=0, help="of the split and the training (default: 0)"
    )
    fit.add_argument(
        "--layers",
        type=_between(1, MOST_LAYERS),
        help=f"couplings (default: one for each column, at most {DEFAULT_LAYERS})",
    )
    fit.add_argument(
        "--width",
        type=_between(1, MOST_WIDTH),
        default=FlowSettings.width,
        help="units of the couplings' networks (default: %(default)s)",
    )
    fit.add_argument(
        "--bins",
        type=_between(2, MOST_BINS),
        default=FlowSettings.bins,
        help="bins of the couplings' splines (default: %(default)s)",
    )
    fit.add_argument(
        "--dropout",
        type=_share,
        default=FlowSettings.dropout,
        help="share of units to drop while training (default: %(default)s)",
    )
    fit.add_argument(
        "--base",
        choices=("normal", "student_t"),
        help="of the flow: student_t for heavy tails (default: by held-out rows)",
    )
    fit.add_argument(
        "--lr",
        type=_positive(float),
        default=LEARNING_RATE,
        help="learning rate (default: %(default)s)",
    )
    fit.add_argument(
        "--batch-size",
        type=_positive(int),
        default=BATCH_SIZE,
        help="rows per step (default: %(default)s)",
    )


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "data", metavar="DATA", help="table: text, Parquet (with pyarrow), npz, or - for a pipe"
    )
    group = command.add_argument_group(
        "reading", "what is not said here is guessed, and the guess is printed"
    )
    group.add_argument("--key", help="array to take from an npz file that holds several")
    group.add_argument("--sep", metavar="C", help='between fields: a character, "tab" or "space"')
    group.add_argument("--decimal", choices=(".", ","), help="decimal mark")
    group.add_argument("--thousands", metavar="C", help="mark between groups of digits")
    group.add_argument("--comment", metavar="C", help="what begins a comment")
    group.add_argument("--header", choices=("yes", "no"), help="whether line 1 names the columns")
    group.add_argument(
        "--index", choices=("yes", "no"), help="whether the first column is an index, to leave out"
    )
    group.add_argument("--encoding", help="of text, such as latin-1")
    group.add_argument(
        "--na", nargs="+", default=[], metavar="WORD", help="further words for missing values"
    )


def _add_missing(command: argparse.ArgumentParser, choices: Sequence[str], text: str) -> None:
    command.add_argument(
        "--missing",
        choices=choices,
        default=choices[0],
        help=f"rows with missing values: {text} (default: refuse)",
    )


def _add_output(
    command: argparse.ArgumentParser, metavar: str, text: str, *, required: bool = False
) -> None:
    command.add_argument("-o", "--output", metavar=metavar, required=required, help=text)
    command.add_argument(
        "--overwrite", action="store_true", help="replace what was written there before"
    )


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def _between(least: int, most: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {least} to {most}, got {text}"
            )
        return value

    return integer


_seed = _between(0, 2**32 - 1)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1), got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
