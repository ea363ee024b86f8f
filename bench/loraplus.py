"""LoRA+ in both orders: `python -m bench.loraplus FOLDER` prints a table of docs/loraplus.md from what a sweep made."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from pipeline.project.logs.run_log import LOSS, epoch_means, read_steps
from pipeline.project.params.grid import TABLE
from pipeline.project.params.sections import FinetuneLora

EARLY = 10  # epochs
Losses = Sequence[tuple[float, float]]  # of each seed, in epoch 10 and in the last, nats a token
Found = Mapping[float, Mapping[float, Losses]]  # ratio → learning rate of A → losses


def losses(folder: Path) -> Found:
    """The mean losses of two epochs of each adapter that did not diverge."""
    found: dict[float, dict[float, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for name, row in json.loads((folder / TABLE).read_text(encoding="utf-8")).items():
        if row["state"] == "done":
            params = json.loads((folder / name / "manifest.json").read_text(encoding="utf-8"))["params"]
            epochs = epoch_means(read_steps(folder / name / LOSS))
            of_ratio = found[params["loraplus_ratio"]]
            of_ratio[params["learning_rate"]].append((epochs[EARLY - 1], epochs[-1]))
    return found


def table(found: Found, shipped: float = FinetuneLora().learning_rate) -> str:
    """Mean ± standard deviation over seeds for each ratio: at the shipped rate of A, and at the best of those tried."""
    early, last = f"loss after {EARLY} epochs", "of the last epoch"
    fixed = f"lr(A) = {shipped:g}: {early} | {last}"
    head = f"| lr(B) / lr(A) | {fixed} | best lr(A): {early} | best lr(A): loss {last} |"
    return "\n".join([head, "|---" * 5 + "|", *_rows(found, shipped)])


def _rows(found: Found, shipped: float) -> Iterator[str]:
    for ratio, by_rate in sorted(found.items()):
        seeds = max(map(len, by_rate.values()))
        whole = {rate: of_seeds for rate, of_seeds in by_rate.items() if len(of_seeds) == seeds}
        cells = [f"{ratio:g}" if ratio >= 1 else f"1/{1 / ratio:g}"]
        cells += [_spread(whole[shipped], epoch) for epoch in range(2)]
        for epoch in range(2):
            best = min(whole, key=lambda rate: mean(one[epoch] for one in whole[rate]))
            cells.append(f"{best:g}: {_spread(whole[best], epoch)}")
        yield f"| {' | '.join(cells)} |"


def _spread(of_seeds: Losses, epoch: int) -> str:
    values = [one[epoch] for one in of_seeds]
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


if __name__ == "__main__":
    print(table(losses(Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts/sweep"))))
