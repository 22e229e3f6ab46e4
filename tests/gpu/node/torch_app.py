"""Weights on a GPU, and answers that depend on all of them, over HTTP.

GIB=30 WEIGHTS= PORT=8000 python3 torch_app.py
python3 torch_app.py save FILE GIB       makes the file that WEIGHTS names

/answer?seed=N     through all weights
/checksum          of all weights
/state             nonce, times of the start
"""

import hashlib
import json
import os
import secrets
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

BEGAN = time.monotonic()
import torch  # noqa: E402

SIDE = 8192
NONCE = secrets.token_hex(8)
TIMES = {"import_s": time.monotonic() - BEGAN}
LOCK = threading.Lock()


def made(gib: float) -> list[torch.Tensor]:
    """Blocks of 128 MiB, always the same."""
    generator = torch.Generator("cuda").manual_seed(11)
    return [
        torch.randn(SIDE, SIDE, generator=generator, device="cuda", dtype=torch.bfloat16)
        for _ in range(int(gib * 8))
    ]


def blocks() -> list[torch.Tensor]:
    """From the file, or made."""
    if path := os.environ.get("WEIGHTS"):
        from safetensors.torch import load_file

        found = load_file(path, device="cuda")
        return [found[name] for name in sorted(found)]
    return made(float(os.environ.get("GIB", "1")))


def answered(seed: int) -> dict[str, object]:
    with LOCK, torch.no_grad():
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(64, SIDE, generator=generator, device="cuda", dtype=torch.bfloat16)
        for block in BLOCKS:
            x = x @ block
            x = x / x.float().pow(2).mean(-1, keepdim=True).sqrt().to(torch.bfloat16)
        octets = x.cpu().view(torch.int16).numpy().tobytes()
        return {"answer": hashlib.sha256(octets).hexdigest()}


def checksum() -> dict[str, object]:
    digest = hashlib.sha256()
    with LOCK, torch.no_grad():
        for block in BLOCKS:
            words = block.view(-1).view(torch.int64)
            places = torch.arange(words.numel(), device="cuda") * 2 + 1
            digest.update(f"{int(words.sum())} {int((words * places).sum())}\n".encode())
    return {"checksum": digest.hexdigest()}


def state() -> dict[str, object]:
    return {"nonce": NONCE, "times": TIMES, "pid": os.getpid(),
            "restored": os.path.exists("/run/quickthaw/restored.json")}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query))
        routes = {
            "/answer": lambda: answered(int(query.get("seed", 1))),
            "/checksum": checksum,
            "/state": state,
        }
        try:
            body, code = json.dumps(routes[parts.path]()).encode(), 200
        except Exception as error:  # noqa: BLE001 - the asker shall see it
            body, code = json.dumps({"error": f"{type(error).__name__}: {error}"}).encode(), 500
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True


if __name__ == "__main__":
    if sys.argv[1:2] == ["save"]:
        from safetensors.torch import save_file

        save_file(
            {f"w{i:04d}": block.cpu() for i, block in enumerate(made(float(sys.argv[3])))},
            sys.argv[2],
        )
        sys.exit()
    BLOCKS = blocks()
    answered(0)
    torch.cuda.synchronize()
    TIMES["ready_s"] = time.monotonic() - BEGAN
    print("ready", json.dumps(TIMES), flush=True)
    Server(("", int(os.environ.get("PORT", "8000"))), Handler).serve_forever()
