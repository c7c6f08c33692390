"""CrossLore in plain PyTorch: a small decoder learns to count, on a CPU, in seconds.

python examples/minimal.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from crosslore import create_optimizer

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))

# was: optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizer = create_optimizer(model, "crosslore", lr=1e-3, rank=16, scale=1.0, refresh_every=20, warmup_steps=5)

for step in range(60):
    start = torch.randint(64, (8, 1))
    tokens = (start + torch.arange(16)) % 64
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
print(f"last loss {loss.item():.3f}")
