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


def draw_published(data, batch_size, rng):
    "Choose episodes by their length, then a start in each."
    chosen = rng.choice(len(data), size=batch_size, p=data.episode_length / data.n_steps)
    return [(e, rng.integers(data.episode_length[e])) for e in chosen]


def windows_published(data, K, drawn):
    "Cut windows one by one, pad, and sum the rewards of the rest of the episode."
    episodes = np.split(np.arange(data.n_steps), data.episode_start[1:])
    out = []
    for e, start in drawn:
        steps = episodes[e]
        take = steps[start:start + K]
        pad = K - len(take)
        rtg = data.rewards[steps[start:]].copy()
        for i in reversed(range(len(rtg) - 1)):
            rtg[i] += rtg[i + 1]
        rtg = rtg[:len(take)] / 1000
        states = (np.concatenate([np.zeros((pad, data.task.state_dim)), data.observations[take]]) - data.state_mean) / data.state_std
        actions = np.concatenate([np.full((pad, data.task.action_dim), -10.0), data.actions[take]])
        out.append((states, actions, np.append(np.zeros(pad), rtg)[:, None], np.append(np.zeros(pad), np.arange(start, start + len(take))), np.arange(K) >= pad))
    return [torch.from_numpy(np.stack(x)) for x in zip(*out)]


def check_windows(data, sampler, rng):
    "Both ways give the same windows, but for the states in the padding, which the published way normalises."
    drawn = draw_published(data, 256, rng)
    ours = sampler.windows(torch.tensor([data.episode_start[e] + start for e, start in drawn]))
    states, actions, rtg, t, mask = windows_published(data, sampler.K, drawn)
    assert torch.equal(ours.mask, mask) and torch.equal(ours.timesteps, t.long())
    for one, other in ((ours.states[mask], states[mask]), (ours.actions, actions), (ours.returns_to_go, rtg)):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4)


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
    check_windows(data, sampler, rng)
    published = seconds(lambda: windows_published(data, 20, draw_published(data, 64, rng)), 30)
    rows.append(("sample, 64 windows of K=20", published, seconds(sampler.sample, 100)))
    for K in (1, 20):
        model = DecisionTransformer(load_backbone(arch=Architecture(3, 128, 4)), data.task)
        def play(n, seed, model=model, K=K):
            return rollout(model, 3600, data.state_mean, data.state_std, K, n, seed=seed)
        one_by_one = pd.concat([play(1, i) for i in range(args.episodes)])
        np.testing.assert_allclose(play(args.episodes, 0)["return"], one_by_one["return"], rtol=1e-3)
        alone = seconds(lambda: [play(1, i) for i in range(args.episodes)], 1)
        rows.append((f"rollout, {args.episodes} episodes, K={K}", alone, seconds(lambda: play(args.episodes, 0), 1)))
    table = pd.DataFrame(rows, columns=["work", "published way (s)", "here (s)"])
    table["ratio"] = table.iloc[:, 1] / table.iloc[:, 2]
    print(f"torch {torch.__version__}, 1 thread")
    print(table.to_string(index=False, float_format="%.4f"))


if __name__ == "__main__":
    main()
