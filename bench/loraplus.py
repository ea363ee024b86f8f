"""LoRA+ with A or B faster: `python -m bench.loraplus FOLDER` prints a table of
explanation/loraplus.md.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from pipeline.project.logs.run_log import LOSS, TABLE, epoch_means, read_steps
from pipeline.stages.methods.lora import FinetuneLora

EARLY = 10  # epochs
Losses = Sequence[tuple[float, float]]  # per seed: epoch 10 and last epoch, nats per token
LossesByRatio = Mapping[float, Mapping[float, Losses]]  # ratio → learning rate of A → losses


def losses(folder: Path) -> LossesByRatio:
    """Mean losses of two epochs, for each adapter that did not diverge."""
    losses_by_ratio: dict[float, dict[float, list[tuple[float, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for name, row in json.loads((folder / TABLE).read_text(encoding="utf-8")).items():
        if row["state"] == "done":
            params = json.loads((folder / name / "manifest.json").read_text(encoding="utf-8"))[
                "params"
            ]
            epochs = epoch_means(read_steps(folder / name / LOSS))
            by_rate = losses_by_ratio[params["loraplus_ratio"]]
            by_rate[params["learning_rate"]].append((epochs[EARLY - 1], epochs[-1]))
    return losses_by_ratio


def table(losses_by_ratio: LossesByRatio, shipped: float = FinetuneLora().learning_rate) -> str:
    """Mean ± standard deviation over seeds per ratio: at the default learning rate of A, and at the
    best one.
    """
    early, last = f"loss after {EARLY} epochs", "of the last epoch"
    fixed = f"lr(A) = {shipped:g}: {early} | {last}"
    head = f"| lr(B) / lr(A) | {fixed} | best lr(A): {early} | best lr(A): loss {last} |"
    return "\n".join([head, "|---" * 5 + "|", *_rows(losses_by_ratio, shipped)])


def _rows(losses_by_ratio: LossesByRatio, shipped: float) -> Iterator[str]:
    for ratio, by_rate in sorted(losses_by_ratio.items()):
        seeds = max(map(len, by_rate.values()))
        complete = {rate: of_seeds for rate, of_seeds in by_rate.items() if len(of_seeds) == seeds}
        cells = [f"{ratio:g}" if ratio >= 1 else f"1/{1 / ratio:g}"]
        cells += [_format_mean(complete[shipped], epoch) for epoch in range(2)]
        for epoch in range(2):
            best = min(complete, key=lambda rate: mean(seed[epoch] for seed in complete[rate]))
            cells.append(f"{best:g}: {_format_mean(complete[best], epoch)}")
        yield f"| {' | '.join(cells)} |"


def _format_mean(of_seeds: Losses, epoch: int) -> str:
    values = [seed[epoch] for seed in of_seeds]
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


if __name__ == "__main__":
    print(table(losses(Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts/sweep"))))
