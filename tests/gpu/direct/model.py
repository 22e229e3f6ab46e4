"""How fast a transformers model answers: `model.py qwen06|qwen8 TOKENS TIMES`.

One JSON line. Random weights. Run it with the library and without by turns: so its cost is told.
"""

import hashlib
import json
import sys
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

SIZES = {
    "qwen06": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
               "num_attention_heads": 16, "tie_word_embeddings": True},
    "qwen8": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
              "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip

name, tokens, times = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(1)
config = Qwen3Config(**SIZES[name], num_key_value_heads=8, head_dim=128, vocab_size=151936)
began = time.perf_counter()
with torch.device("cuda"):
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3ForCausalLM(config).eval()
made = time.perf_counter() - began
ids = torch.randint(0, 150000, (1, 32), generator=torch.Generator().manual_seed(5)).cuda()


def generate(count: int) -> torch.Tensor:
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    torch.cuda.synchronize()
    return out.cpu()


with torch.no_grad():
    generate(8)
    rates: list[float] = []
    out = generate(tokens)
    for _ in range(times):
        began = time.perf_counter()
        out = generate(tokens)
        rates.append(round(tokens / (time.perf_counter() - began), 2))
free, total = torch.cuda.mem_get_info()
found = {
    "model": name, "tokens a second": rates, "median": sorted(rates)[times // 2],
    "made_s": round(made, 3), "used_mib": (total - free) >> 20,
    "said": hashlib.sha256(str(out.tolist()).encode()).hexdigest()[:12],
}  # fmt: skip
print(json.dumps(found))
