"""Speed of data and evaluation against the published implementation's algorithms, same work, one run.

    python benchmarks/foundation.py            # prints a table, about a minute on one core

`sample`: a batch of 64 windows of K=20, by a loop over windows that sums the rest of the episode's rewards anew for each, as the published code does.
`rollout`: episodes played one after the other with batch 1, against all as one batch; same model, same seeds.
"""
import argparse
import time

import numpy as np
import pandas as pd
import torch

from dt_pretrain.backbones import Architecture, load_backbone
from dt_pretrain.collection import load_trajectories
from dt_pretrain.decision_transformer import DecisionTransformer
from dt_pretrain.rollouts import rollout
from dt_pretrain.trajectories import ContextSampler


def sample_published(data, K, batch_size, rng):
    "Draw windows one by one: choose an episode by its length, then a start, pad, and sum the rewards of the rest of the episode."
    episodes = np.split(np.arange(data.n_steps), data.episode_start[1:])
    p = data.episode_length / data.n_steps
    out = []
    for e in rng.choice(len(data), size=batch_size, p=p):
        steps = episodes[e]
        start = rng.integers(len(steps))
        take = steps[start:start + K]
        pad = K - len(take)
        rtg = data.rewards[steps[start:]].copy()
        for i in reversed(range(len(rtg) - 1)):
            rtg[i] += rtg[i + 1]
        rtg = rtg[:len(take)] / 1000
        states = (np.concatenate([np.zeros((pad, data.task.state_dim)), data.observations[take]]) - data.state_mean) / data.state_std
        actions = np.concatenate([np.full((pad, data.task.action_dim), -10.0), data.actions[take]])
        out.append((states, actions, np.append(np.zeros(pad), rtg), np.append(np.zeros(pad), np.arange(start, start + len(take))), np.arange(K) >= pad))
    return [torch.from_numpy(np.stack(x)) for x in zip(*out)]


def seconds(f, n):
    f()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = load_trajectories("hopper-medium"), []
    sampler, rng = ContextSampler(data, 20, 64), np.random.default_rng(0)
    rows.append(("sample, 64 windows of K=20", seconds(lambda: sample_published(data, 20, 64, rng), 30), seconds(sampler.sample, 100)))
    for K in (1, 20):
        model = DecisionTransformer(load_backbone(arch=Architecture(3, 128, 4)), data.task)
        def play(n, seed, model=model, K=K):
            return rollout(model, 3600, data.state_mean, data.state_std, K, n, seed=seed)
        alone = seconds(lambda: [play(1, i) for i in range(args.episodes)], 1)
        rows.append((f"rollout, {args.episodes} episodes, K={K}", alone, seconds(lambda: play(args.episodes, 0), 1)))
    table = pd.DataFrame(rows, columns=["work", "published way (s)", "here (s)"])
    table["ratio"] = table.iloc[:, 1] / table.iloc[:, 2]
    print(f"torch {torch.__version__}, 1 thread")
    print(table.to_string(index=False, float_format="%.4f"))


if __name__ == "__main__":
    main()
