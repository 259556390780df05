"""Draws the training curves: python curves.py OUT.svg LABEL=log.json ... (the logs that train.py writes)"""

import json
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

figure, axes = pyplot.subplots(figsize=(7, 4))
for pair in sys.argv[2:]:
    label, _, path = pair.partition("=")
    log = json.load(open(path))
    tokens = [step * log["tokens"] / log["steps"] / 1e6 for step, _, _ in log["loss"]]
    loss = [value for _, value, _ in log["loss"]]
    smooth = [sum(loss[max(0, i - 9) : i + 1]) / len(loss[max(0, i - 9) : i + 1]) for i in range(len(loss))]
    axes.plot(tokens, smooth, label=label, linewidth=1.2)
axes.set(xlabel="million tokens", ylabel="loss, nats a token (mean of 10 readings)", yscale="log")
axes.legend(frameon=False)
axes.grid(alpha=0.3, which="both")
figure.tight_layout()
pyplot.rcParams["svg.hashsalt"] = "story"
figure.savefig(sys.argv[1], metadata={"Date": None})
