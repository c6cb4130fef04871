"""Gradient confusion against the published implementation's algorithm, same model, batch and result.

    python benchmarks/gradients.py            # 3 blocks x 128, 50 windows of K=20
    python benchmarks/gradients.py --width 384 --blocks 6

Published way: a backward pass a window, the whole gradients of the blocks kept, then a scalar product and two norms for each of the 50 x 50 pairs.
Here: gradients of all windows block by block, Gram matrix summed tensor by tensor. Each way runs in a process of its own, so that its peak memory can be read (Linux).
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from dt_pretrain.analysis.activations import analysis_batch
from dt_pretrain.analysis.gradients import backward_passes, gradient_cosines
from dt_pretrain.backbones import Architecture, load_backbone
from dt_pretrain.collection import load_trajectories
from dt_pretrain.decision_transformer import DecisionTransformer


def cosines_published(model, batch):
    "Separate passes, whole gradients kept, then each pair."
    gradients = []
    for i in range(len(batch.states)):
        gradients += backward_passes(model, [batch[i:i + 1]], lambda g: torch.cat([x.flatten() for k, x in g.items() if k.startswith("backbone.h.")]))
    return np.array([[(torch.dot(x, y) / (torch.norm(x) * torch.norm(y))).item() for y in gradients] for x in gradients])


def peak_mib():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measure(way, blocks, width, n):
    "Seconds of one core and MiB above what the process held before, and the result."
    torch.set_num_threads(1)
    data = load_trajectories("hopper-medium", n_steps=3000)
    model = DecisionTransformer(load_backbone(arch=Architecture(blocks, width, width // 32)), data.task).eval()
    batch, compute = analysis_batch(data, n), {"published": cosines_published, "here": gradient_cosines}[way]
    compute(model, batch[:2])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = peak_mib(), time.process_time()
    cosines = compute(model, batch)
    return {"seconds": time.process_time() - start, "mib": peak_mib() - before, "cosines": cosines.tolist()}


def gradient_confusion_benchmark(blocks=3, width=128, n=50):
    "Both ways, each in its own process: seconds, peak memory, ratios."
    found = {}
    for way in ("published", "here"):
        command = [sys.executable, __file__, "--way", way, "--blocks", str(blocks), "--width", str(width), "--n", str(n)]
        found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    cosines = {way: np.array(f.pop("cosines")) for way, f in found.items()}
    for way, f in found.items():
        f["worst_self_cosine"] = cosines[way].diagonal()[np.abs(cosines[way].diagonal() - 1).argmax()]  # 1 but for rounding
    # torch.norm sums in float32, too little for a vector of many millions of entries: scale the published cosines by their own self-cosines
    root = np.sqrt(cosines["published"].diagonal())
    difference = np.abs(cosines["published"] / np.outer(root, root) - cosines["here"]).max()
    assert difference < 1e-3, difference
    ratio = {k: found["published"][k] / found["here"][k] for k in ("seconds", "mib")}
    return found | {"ratio": ratio, "largest_difference": difference}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=("published", "here"))
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--n", type=int, default=50)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.blocks, args.width, args.n)))
    else:
        print(json.dumps(gradient_confusion_benchmark(args.blocks, args.width, args.n), indent=1))


if __name__ == "__main__":
    main()
