"""`make bench`: speed relative to references, measured in the same run on this machine.

`python -m bench sweep merge` runs these alone.
"""

import sys

from rich.console import Console
from rich.table import Table

from bench.calculator import calculator
from bench.commands import commands
from bench.curves import curves
from bench.data import data
from bench.decoding import decoding
from bench.engine import engine
from bench.gpu import gpu
from bench.keyboard import keyboard
from bench.memory import memory
from bench.merge import merge
from bench.methods import methods
from bench.methods_real import methods_real
from bench.models import models
from bench.packing import packing
from bench.preferences import preferences
from bench.quantized import quantized
from bench.real import real
from bench.recipe import recipe
from bench.serve import serve
from bench.several import several
from bench.sweep import sweep
from bench.terminal import terminal
from bench.training import training

BENCHMARKS = (
    *(
        commands,
        terminal,
        keyboard,
        calculator,
        curves,
        models,
        data,
        engine,
        memory,
        training,
        methods,
        sweep,
    ),
    *(
        real,
        packing,
        methods_real,
        preferences,
        quantized,
        merge,
        several,
        serve,
        decoding,
        gpu,
        recipe,
    ),
)


def main(names: list[str]) -> None:
    every = {benchmark.__name__: benchmark for benchmark in BENCHMARKS}
    if unknown := set(names) - set(every):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}. There are: {', '.join(every)}.")
    table = Table("what", "measured", "compared with", "ratio", "goal", "", box=None)
    try:
        for name in names or every:
            for row in every[name]():
                table.add_row(*row.cells())
    finally:  # what was measured before an error or Ctrl-C is shown
        Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
