"""A PyTorch process that is asked without pause, from several threads: see `loop`.

`python torch_load.py DIRECTORY GIB`: matrices of bfloat16, answers of several threads on streams of
their own and from a CUDA graph, compared bit for bit with the first ones.
"""

import contextlib
import json
import select
import sys
import threading
import time
from pathlib import Path

import torch

HOME, GIB = Path(sys.argv[1]), float(sys.argv[2])
SIDE = 8192
SEEDS = (1, 2, 3)
counts = {"answers": 0, "wrong": 0, "errors": 0, "interrupted": 0, "graphs": 0, "slowest_us": 0}
lock = threading.Lock()
said: list[str] = []


def blocks() -> list[torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(11)
    many = int(GIB * 1024 / 128)
    return [
        torch.randn(SIDE, SIDE, generator=g, device="cuda", dtype=torch.bfloat16)
        for _ in range(many)
    ]


def chain(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    for w in weights:
        x = x @ w
        x = x / x.float().pow(2).mean(-1, keepdim=True).sqrt().to(torch.bfloat16)
    return x


def start(seed: int) -> torch.Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(64, SIDE, generator=g, device="cuda", dtype=torch.bfloat16)


def count(began: float, right: bool, **more: int) -> None:
    with lock:
        counts["answers"] += 1
        counts["wrong"] += not right
        counts["slowest_us"] = max(counts["slowest_us"], int((time.monotonic() - began) * 1e6))
        for name, by in more.items():
            counts[name] += by


def guarded(work) -> None:  # type: ignore[no-untyped-def]
    try:
        with torch.no_grad():
            work()
    except Exception as error:  # noqa: BLE001 - told
        with lock:
            counts["errors"] += 1
            said.append(f"{type(error).__name__}: {error}"[:300])


def asker(weights: list[torch.Tensor], right: dict[int, torch.Tensor]) -> None:
    stream = torch.cuda.Stream()
    n = 0
    while not (HOME / "stop").exists():
        began, seed = time.monotonic(), SEEDS[n % len(SEEDS)]
        n += 1
        with torch.cuda.stream(stream):
            out = chain(start(seed), weights).cpu()
        count(began, torch.equal(out, right[seed]))


def replayer(weights: list[torch.Tensor], right: dict[int, torch.Tensor]) -> None:
    graph, x = torch.cuda.CUDAGraph(), start(SEEDS[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain(x, weights)  # a thread's first use of cuBLAS makes things that no capture may
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = chain(x, weights)
    graphs.set()
    while not (HOME / "stop").exists():
        began = time.monotonic()
        with torch.cuda.stream(stream):
            out.zero_()
            graph.replay()
            got = out.cpu()
        count(began, torch.equal(got, right[SEEDS[0]]), graphs=1)


def sleeper() -> None:
    poll = select.epoll()
    while not (HOME / "stop").exists():
        began = time.monotonic()
        with contextlib.suppress(InterruptedError):
            poll.poll(0.2)
        if time.monotonic() - began < 0.19:
            counts["interrupted"] += 1


def say() -> None:
    with lock:
        (HOME / "status.new").write_text(json.dumps({**counts, "said": said[:3]}))
    (HOME / "status.new").rename(HOME / "status")


graphs = threading.Event()
weights = blocks()
with torch.no_grad():
    chain(start(0), weights).cpu()
    right = {seed: chain(start(seed), weights).cpu() for seed in SEEDS}
torch.cuda.synchronize()
threads = [threading.Thread(target=guarded, args=(lambda: replayer(weights, right),))]
threads[0].start()
graphs.wait(10)
for _ in range(3):
    threads.append(threading.Thread(target=guarded, args=(lambda: asker(weights, right),)))
    threads[-1].start()
threading.Thread(target=sleeper, daemon=True).start()
while not (HOME / "stop").exists():
    say()
    time.sleep(0.02)
for each in threads:
    each.join()
say()
sys.exit(1 if counts["wrong"] or counts["errors"] else 0)
