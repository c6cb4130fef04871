"""CKA of all pairs and mutual information of many problems, against the published way on the same arrays, one run each, one thread.

    python benchmarks/representations.py [cka] [mine] [critics] [answer]

Each function returns (work, published way, here), in CPU seconds of this process, since the machine is shared.
"""
import sys
import time

import numpy as np
import pandas as pd
import torch

from dt_pretrain.analysis.cka import cka_matrix
from dt_pretrain.analysis.mutual_information import mine_published, mutual_information

CLOCK = time.process_time


def seconds(f):
    start = CLOCK()
    return f(), CLOCK() - start


def cka_published(x, y):
    "Gram matrices of both, each checked for symmetry and centred, for this pair alone: what the published code does for every pair."
    def centre(gram):
        if not np.allclose(gram, gram.T):
            raise ValueError("not symmetric")
        gram, n = gram.copy(), len(gram)
        np.fill_diagonal(gram, 0)
        means = gram.sum(0, dtype=np.float64) / (n - 2)
        means -= means.sum() / (2 * (n - 1))
        gram -= means[:, None]
        gram -= means[None, :]
        np.fill_diagonal(gram, 0)
        return gram
    k, l = centre(x.dot(x.T)), centre(y.dot(y.T))
    return k.ravel().dot(l.ravel()) / (np.linalg.norm(k) * np.linalg.norm(l) + 1e-6)


def bench_cka(layers=25, n=1000, width=768):
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(n, width)).astype(np.float32) for _ in range(layers)]
    for i in range(1, layers):
        xs[i] = .8 * xs[i - 1] + .6 * xs[i]   # neighbours resemble each other
    cka_matrix(xs)   # once before, as an earlier call would have
    here, fast = seconds(lambda: cka_matrix(xs).to_numpy())
    slow, published = seconds(lambda: np.array([[cka_published(x, y) for y in xs] for x in xs]))
    assert np.abs(here - slow).max() < 1e-3, np.abs(here - slow).max()
    return f"CKA, {layers}x{layers} layers, n={n}, p={width}", published, fast


def mine_one(x, t, passes, batch_size=50, hidden=400, lr=1e-4):
    "One published network in plain PyTorch; the loss is read with .item() at each step, as published."
    x, t = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(t, dtype=torch.float32)
    f = torch.nn.Sequential(torch.nn.Linear(x.shape[1] + t.shape[1], hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, hidden), torch.nn.ReLU(),
                            torch.nn.Linear(hidden, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1))
    opt, average, total = torch.optim.Adam(f.parameters(), lr=lr), None, 0.
    for _ in range(passes):
        order = torch.randperm(len(x))
        for idx in order[:len(x) // batch_size * batch_size].split(batch_size):
            joint, marginal = f(torch.cat([x[idx], t[idx]], 1)), f(torch.cat([x[idx], t[idx][torch.randperm(len(idx))]], 1))
            now = marginal.exp().mean().detach()
            average = now if average is None else .01 * now + .99 * average
            loss = (marginal.exp() / (average + 1e-6)).mean() - joint.mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            total -= loss.item()
    with torch.no_grad():
        joint, marginal = f(torch.cat([x, t], 1)), f(torch.cat([x, t[torch.randperm(len(x))]], 1))
        return (joint.mean() - marginal.exp().mean().log()).item()


def arrays(problems, n, dx, dt):
    rng = np.random.default_rng(0)
    return rng.normal(size=(problems, n, dx)), rng.normal(size=(problems, n, dt))


def bench_mine(problems=12, passes=50, dx=11, dt=128):
    "Published networks of 3 x 400 units, one after the other and together, as many steps."
    xs, ts = arrays(problems, 100, dx, dt)
    mine_one(xs[0], ts[0], 3), mine_published(xs[:2], ts[:2], passes=3, progress=False)
    _, fast = seconds(lambda: mine_published(xs, ts, passes=passes, progress=False))
    _, published = seconds(lambda: [mine_one(x, t, passes) for x, t in zip(xs, ts)])
    return f"MINE, {problems} published networks, {2 * passes} steps, width {dt}", published, fast


def bench_critics(problems=48, steps=300):
    "The corrected estimate, networks one after the other and together; same work."
    xs, ts = arrays(problems, 1000, 8, 8)
    ts = .9 * xs + (1 - .81)**.5 * ts
    run = lambda chunk, p=problems: mutual_information(xs[:p], ts[:p], n_seeds=1, null=False, steps=steps, chunk=chunk, progress=False)
    run(None, 2)
    together, fast = seconds(lambda: run(None))
    alone, slow = seconds(lambda: run(1))
    assert np.abs(together.value - alone.value).max() < .3   # the same networks; rounding moves the step at which some stop
    return f"InfoNCE, {problems} networks of 2 x 64, at most {steps} steps", slow, fast


def bench_answer(problems=3, dx=11, dt=128):
    "One estimate: the published network with all its 2000 steps on 100 samples, against the corrected one with 1000 samples (48 together)."
    xs, ts = arrays(problems, 100, dx, dt)
    _, published = seconds(lambda: [mine_one(x, t, 1000) for x, t in zip(xs, ts)])
    xs, ts = arrays(48, 1000, dx, dt)
    ts[..., :dx] += 2 * xs
    _, here = seconds(lambda: mutual_information(xs, ts, n_seeds=1, null=False, progress=False))
    return "one estimate: MINE as published, InfoNCE (not the same work)", published / problems, here / 48


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[1:] or ["cka", "mine", "critics", "answer"]
    rows = []
    for name in names:
        rows.append(globals()[f"bench_{name}"]())
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows, columns=["work", "published way (s)", "here (s)"])
    table["ratio"] = table.iloc[:, 1] / table.iloc[:, 2]
    print(f"torch {torch.__version__}, 1 thread, CPU seconds of the process")
    print(table.to_string(index=False, float_format="%.3f"))
