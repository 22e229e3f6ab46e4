"""Program: a PyTorch process with a known payload and features on request, to be checkpointed.

    python3 -m tests.gpu.torch_worker HOME LAYOUT [FEATURE...]

LAYOUT is as `worker.cu` takes it: MIB[xCOUNT],... Features are the functions of FEATURES; each is
computed once at the start, and `check` computes it again and wants the same bits.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.gpu import control

SLICE = 8 << 20
"""Words that are verified at a time."""

Compute = Callable[[], Any]


def blocks(layout: str) -> list[Any]:
    """Tensors of int64 on the device; word i of block b is (i + b) times an odd number."""
    made: list[Any] = []
    for each in layout.split(","):
        mib, _, count = each.partition("x")
        for _ in range(int(count or 1)):
            block = torch.empty(int(mib) << 17, dtype=torch.int64, device="cuda")
            for at in range(0, block.numel(), SLICE):
                block[at : at + SLICE] = expected(len(made), at, block)
            made.append(block)
    return made


def expected(index: int, at: int, block: Any) -> Any:
    """Returns the right content of the slice at `at` of block `index`."""
    end = min(at + SLICE, block.numel())
    return (torch.arange(at, end, device="cuda") + index) * 0x9E3779B97F4A7C1


def payload_right(found: list[Any]) -> bool:
    """Every word of every block."""
    return all(
        torch.equal(block[at : at + SLICE], expected(index, at, block))
        for index, block in enumerate(found)
        for at in range(0, block.numel(), SLICE)
    )


def noise(*shape: int) -> Any:
    """The same numbers whenever the process is the same."""
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(7), device="cuda")


def cublas() -> Compute:
    left, right = noise(2048, 2048), noise(2048, 2048).bfloat16()
    return lambda: torch.cat([(left @ left).flatten(), (right @ right).float().flatten()])


def cudnn() -> Compute:
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    layer = torch.nn.Conv2d(64, 64, 3, padding=1).cuda()
    image = noise(8, 64, 64, 64)
    return lambda: layer(image).detach()


def graph() -> Compute:
    """A captured graph; its input is changed before each replay, so that a replay does work."""
    source, weights = noise(512, 512), noise(512, 512)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.relu(source @ weights).sum(1)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        result = torch.relu(source @ weights).sum(1)
    first = source.clone()

    def replay() -> Any:
        result.zero_()
        source.copy_(first)
        captured.replay()
        return result.clone()

    return replay


def streams() -> Compute:
    """Four streams that wait for each other by events."""
    several = [torch.cuda.Stream() for _ in range(4)]
    start = noise(1024, 1024)

    def run() -> Any:
        value = start
        for stream in several:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                value = torch.tanh(value @ start)
            torch.cuda.current_stream().wait_stream(stream)
        return value

    return run


def pinned() -> Compute:
    """256 MiB of pinned host memory, written by the device and read by it."""
    host = torch.empty(64 << 20, dtype=torch.int32, pin_memory=True)
    host.copy_(torch.arange(64 << 20, dtype=torch.int32))
    back = torch.empty(64 << 20, dtype=torch.int32, pin_memory=True)

    def run() -> Any:
        onto = host.to("cuda", non_blocking=True) * 3
        back.copy_(onto, non_blocking=True)
        torch.cuda.synchronize()
        return back.clone()

    return run


def compiled() -> Compute:
    """torch.compile output: Triton kernels that were made in this process."""
    start = noise(4096, 256)

    def function(value: Any) -> Any:
        return torch.nn.functional.gelu(value * 2 + 1).sum(-1).sin()

    made = torch.compile(function)
    return lambda: made(start)


def nvml() -> Compute:
    """NVML, initialised in the process and left so."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return lambda: torch.tensor([pynvml.nvmlDeviceGetMemoryInfo(handle).total])


FEATURES: dict[str, Callable[[], Compute]] = {
    each.__name__: each for each in (cublas, cudnn, graph, streams, pinned, compiled, nvml)
}


def main() -> None:
    """Build, say what it took, serve."""
    started = time.monotonic()
    home, layout, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.zeros(1, device="cuda")
    context_s = time.monotonic() - started
    held, wrong = blocks(layout), {}
    features: dict[str, tuple[Compute, Any]] = {}
    for name in names:
        try:
            compute = FEATURES[name]()
            compute()
            features[name] = compute, compute().cpu()
        except Exception as error:  # noqa: BLE001 - one feature less, and said so
            wrong[name] = f"{type(error).__name__}: {error}"[:400]

    def ask(verb: str, argument: str) -> dict[str, Any]:
        del argument
        if verb != "check":
            return {"ok": False, "error": f"no {verb}"}
        same = {"payload": payload_right(held)}
        for name, (compute, first) in features.items():
            same[name] = torch.equal(compute().cpu(), first)
        torch.cuda.synchronize()
        return {"ok": all(same.values()), "same": same}

    payload_right(held)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    spent = {"context_s": round(context_s, 2), "all_s": round(time.monotonic() - started, 2)}
    control.reply(home, 0, {"ready": True, "not_made": wrong, "torch": torch.__version__, **spent})
    control.serve(home, ask)


if __name__ == "__main__":
    main()
