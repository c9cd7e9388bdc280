"""The channel couplings of every classification network of torchvision: time, layers with free channels, what half would save.

``python benchmarks/channels.py [name ...]``: a Markdown table. Only shapes matter, so weights are dropped;
seconds are CPU time of ``channels.couple`` alone, the best of three. "Half": half of every group's channels removed.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch

import graphopt as go
from graphopt.bench import markdown
from graphopt.passes.prune import channels
from graphopt.torchvision_import import torchvision_models

_RUNS = 3
_SIDES = {"inception_v3": 299}


def _row(name: str) -> tuple[str, ...]:
    options: dict[str, object] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": False}
    model = torchvision_models().get_model(name, **options).eval().to("meta")
    side = _SIDES.get(name, 224)
    program = go.capture(model, (torch.empty(1, 3, side, side, device="meta"),))
    seconds = []
    for _ in range(_RUNS):
        started = time.process_time()
        coupling = channels.couple(program)
        seconds.append(time.process_time() - started)
    keep = {g: g.best(torch.zeros(g.size), g.count(g.size / 2)) for g in coupling.groups}
    model_of = channels.CostModel(coupling)
    whole, part = model_of({}), model_of(keep)
    free = sum(share > 0 for share in coupling.share.values())
    return (
        name,
        f"{min(seconds):.2f}",
        str(len(coupling.groups)),
        f"{free} of {len(coupling.share)}",
        f"{100 * part.parameters / whole.parameters:.0f} %",
        f"{100 * part.macs / whole.macs:.0f} %",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names
    if not names:
        names = torchvision_models().list_models(module=torchvision_models())
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    titles = ("network", "CPU s", "groups", "layers", "parameters at half", "MACs at half")
    rows = []
    for name in names:
        rows.append(_row(name))
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    print("\n".join(markdown.table(titles, rows)))


if __name__ == "__main__":
    main()
