r"""The same spline flow in six libraries: CPU time of what density estimation and variational inference ask of it. And
an autoregressive one in three, and a continuous one in two.

    log_prob        log-density of a batch, no gradient
    training step   log-density of a batch and its gradient with respect to all parameters
    VI step         draws with their log-density under a toy target, and the gradient
    sampling        draws, no gradient

No optimizer is in any of them. The floor is what the conditioners alone cost, which no spline flow can undercut.
``benchmarks/_peers.py`` says how each library is called.

    python -m benchmarks.spline_flows
    python -m benchmarks.spline_flows --quick
    python -m benchmarks.spline_flows --sizes 8x512 --peers pyro zuko --repeats 20
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks import RESULTS
from benchmarks._flows import (
    AUTOREGRESSIVE,
    AUTOREGRESSIVE_BUILDERS,
    BUILDERS,
    COMPILED,
    CONDITIONERS,
    CONTINUOUS,
    CONTINUOUS_BUILDERS,
    CONTINUOUS_STEPS,
    DEFAULTS,
    FUSED,
    MATCHING_STEP,
    PEERS,
    REFERENCE,
    float32_errors,
    missing,
)
from benchmarks._setting import QUANTITIES, Setting, Task
from models._measure import Report, Timing, cpu_times, number, table

SIZES = ((2, 256), (8, 512), (32, 1024), (64, 4096))
LARGEST_AUTOREGRESSIVE = 8  # beyond it a draw of others, D passes, takes seconds
LARGEST_CONTINUOUS = 8  # beyond it a step of maximum likelihood takes many seconds
GROWTH = {
    "dim": (2, 4, 8, 16, 32, 64),
    "count_bins": (4, 8, 16, 32),
    "num_couplings": (2, 4, 8, 16),
}
GROWTH_WORDS = {"dim": "D", "count_bins": "bins", "num_couplings": "couplings"}
GROWTH_COMPETITORS = (FUSED, REFERENCE, "pyro", "zuko", CONDITIONERS)
GROWTH_QUANTITY = "training step"
BUDGET_S = 12.0

Timings = dict[str, dict[str, Timing]]


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    report = Report("Spline flows, library against library")
    absent = missing()
    for name in absent:
        reason = "the fused kernel is not in use" if name == FUSED else "not installed"
        report.add(f"Left out: {name} ({reason}).", "")
    wanted = [FUSED, REFERENCE, DEFAULTS, *args.peers, CONDITIONERS]
    if args.compile:
        wanted.insert(2, COMPILED)
    names = [name for name in wanted if name not in absent]

    sizes = args.sizes or (SIZES[1:2] if args.quick else SIZES)
    settings = [Setting(dim, batch) for dim, batch in sizes]
    repeats = args.repeats or (3 if args.quick else 15)
    report.add(
        "8 couplings of half masks, K = 8, two hidden layers of 64 with ReLU, bound 5, float32. CPU milliseconds of a "
        f"call, median of up to {repeats} interleaved rounds (best in brackets); x: times {_ours(names)}, median of "
        "the rounds' ratios.",
        "",
    )
    results = {}
    for setting in settings:
        results[setting] = measure(BUILDERS, names, setting, repeats, args.quick)
    for quantity in QUANTITIES:
        lines = _comparison(results, names, quantity, _ours(names))
        report.add(f"## {quantity}", "", *lines, "")
    report.add("## Times the conditioners alone", "", *_floor(results, names), "")
    report.add("## Accuracy", "", *_accuracy(settings), "")
    report.add(*_autoregressive(absent, settings, repeats, args.quick))
    report.add(*_continuous(absent, settings, repeats, args.quick))
    if not args.quick:
        for field in GROWTH:
            report.add(*_growth(field, [n for n in names if n in GROWTH_COMPETITORS], repeats), "")
    report.save(args.output)


def measure(
    builders: dict[str, Callable[[Setting], dict[str, Task]]],
    names: Sequence[str],
    setting: Setting,
    repeats: int,
    quick: bool = False,
) -> Timings:
    """Timings by quantity and competitor."""
    tasks = {name: builders[name](setting) for name in names}
    return {
        quantity: cpu_times(
            {name: tasks[name][quantity] for name in names},
            repeats=repeats,
            block_ms=5.0 if quick else 20.0,
            budget_s=BUDGET_S,
        )
        for quantity in QUANTITIES
    }


def _ours(names: Sequence[str]) -> str:
    """What the others are compared with: the kernel where there is one."""
    return FUSED if FUSED in names else REFERENCE


def _sizes(settings: Sequence[Setting]) -> list[str]:
    return [f"({s.dim}, {s.batch})" for s in settings]


def _comparison(
    results: dict[Setting, Timings], names: Sequence[str], quantity: str, ours: str
) -> list[str]:
    header = ["(D, batch)"]
    for size in _sizes(list(results)):
        header += [f"{size} ms", "x"]
    rows = []
    for name in names:
        row = [name]
        for timings in results.values():
            timing = timings[quantity][name]
            row += [str(timing), f"{timing.times(timings[quantity][ours]):.2f}"]
        rows.append(row)
    return table(header, rows)


def _autoregressive(
    absent: Sequence[str], settings: Sequence[Setting], repeats: int, quick: bool
) -> list[str]:
    names = [name for name in AUTOREGRESSIVE_BUILDERS if name not in absent]
    results = {
        setting: measure(AUTOREGRESSIVE_BUILDERS, names, setting, repeats, quick)
        for setting in settings
        if setting.dim <= LARGEST_AUTOREGRESSIVE
    }
    if not results:
        return []
    lines = [
        "## Autoregressive flows",
        "",
        "The same sizes, masked networks, densities in one pass, draws dimension by dimension; x: times "
        f"{AUTOREGRESSIVE}.",
        "",
    ]
    for quantity in QUANTITIES:
        lines += [f"### {quantity}", "", *_comparison(results, names, quantity, AUTOREGRESSIVE), ""]
    return lines


def _continuous(
    absent: Sequence[str], settings: Sequence[Setting], repeats: int, quick: bool
) -> list[str]:
    names = [name for name in CONTINUOUS_BUILDERS if name not in absent]
    small = [setting for setting in settings if setting.dim <= LARGEST_CONTINUOUS]
    results = {s: measure(CONTINUOUS_BUILDERS, names, s, repeats, quick) for s in small}
    if not results:
        return []
    lines = [
        "## Continuous flows",
        "",
        "Fields as the libraries make them of the hidden layers of the conditioners above: ours has a residual block "
        "for each, gated by the time, zuko's the layers themselves. The trace is exact; ours in "
        f"{CONTINUOUS_STEPS} fixed steps of order 4, zuko's by its adaptive solver to its tolerance of 1e-6. The "
        f"training step is one of maximum likelihood. x: times {CONTINUOUS}.",
        "",
    ]
    for quantity in QUANTITIES:
        lines += [f"### {quantity}", "", *_comparison(results, names, quantity, CONTINUOUS), ""]
    row = ["ms"]
    for setting in small:
        step = {CONTINUOUS: CONTINUOUS_BUILDERS[CONTINUOUS](setting)[MATCHING_STEP]}
        row.append(str(cpu_times(step, repeats=repeats, budget_s=BUDGET_S)[CONTINUOUS]))
    title = "### A step of flow matching, by which `fit` trains ours"
    return [*lines, title, "", *table(["(D, batch)", *_sizes(small)], [row]), ""]


def _floor(results: dict[Setting, Timings], names: Sequence[str]) -> list[str]:
    rows = []
    for name in (n for n in names if n != CONDITIONERS):
        for quantity in QUANTITIES[1:3]:
            rows.append([f"{name}: {quantity}"])
            for timings in results.values():
                ratio = timings[quantity][name].times(timings[quantity][CONDITIONERS])
                rows[-1].append(f"{ratio:.2f}")
    return table(["(D, batch)", *_sizes(list(results))], rows)


def _accuracy(settings: Sequence[Setting]) -> list[str]:
    errors = [float32_errors(setting) for setting in settings]
    rows = [[name, *(f"{error[name]:.1e}" for error in errors)] for name in errors[0]]
    lines = [
        "Largest |log p in float32 - log p in float64| over the batch, nats; float64 by the reference.",
        "",
    ]
    return lines + table(["(D, batch)", *_sizes(settings)], rows)


def _growth(field: str, names: Sequence[str], repeats: int) -> list[str]:
    start = Setting(8, 512)
    columns = []
    for value in GROWTH[field]:
        setting = replace(start, **{field: value})
        tasks = {name: BUILDERS[name](setting)[GROWTH_QUANTITY] for name in names}
        columns.append(cpu_times(tasks, repeats=repeats, budget_s=BUDGET_S / 3))
    rows = [[name, *(number(column[name].median) for column in columns)] for name in names]
    words = GROWTH_WORDS[field]
    title = f"## How the {GROWTH_QUANTITY} grows with {words}"
    held = [f"{w} = {getattr(start, f)}" for f, w in GROWTH_WORDS.items() if f != field]
    lines = [title, "", f"ms; {', '.join(held)}, batch {start.batch}.", ""]
    return lines + table([words, *map(str, GROWTH[field])], rows)


def _size(text: str) -> tuple[int, int]:
    dim, batch = text.split("x")
    return int(dim), int(batch)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spline_flows",
        description="The same spline flow in several libraries: CPU time and accuracy.",
    )
    parser.add_argument(
        "--sizes", nargs="+", type=_size, metavar="DxBATCH", help="such as 8x512 (default: four)"
    )
    parser.add_argument("--repeats", type=int, help="rounds at most (default: 15)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="default: all")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too: minutes for each size"
    )
    parser.add_argument("--quick", action="store_true", help="one size, few rounds: a rehearsal")
    parser.add_argument("--output", default=RESULTS / "spline_flows.md", help="Markdown file")
    return parser


if __name__ == "__main__":
    main()
