"""Gradient accumulation with compact gradients: no weight's gradient is formed, only what its subspace keeps of it.

python examples/accumulation.py

`accumulation_steps` and `max_grad_norm` go to `create_optimizer`: there is no `.grad` that could be clipped outside.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from crosslore import create_optimizer

MICRO_BATCHES = 4

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
optimizer = create_optimizer(
    model, "crosslore_plus", lr=1e-3, rank=16, scale=1.0, refresh_every=20,
    gradients="compact", accumulation_steps=MICRO_BATCHES, max_grad_norm=1.0,
)  # fmt: skip
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)

for step in range(40):
    total = 0.0
    for _ in range(MICRO_BATCHES):
        tokens = (torch.randint(64, (2, 1)) + torch.arange(16)) % 64
        loss = model(input_ids=tokens, labels=tokens).loss / MICRO_BATCHES
        loss.backward()
        total += loss.item()
    assert model.model.layers[0].mlp.up_proj.weight.grad is None
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {total:.3f}, gradient norm {optimizer.compact.grad_norm():.3f}")
print(f"last loss {total:.3f}")
