"""The least memory: every weight steps inside backward and its gradient is freed; saved and resumed like any optimizer.

python examples/layerwise.py
"""

import io

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from crosslore import create_optimizer

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
options = {"lr": 1e-3, "rank": 16, "scale": 1.0, "refresh_every": 20, "gradients": "compact-layerwise"}


def new() -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    """Return a model and its optimizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    return model, create_optimizer(model, "crosslore_plus", **options)


def train(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Return the last loss of some steps."""
    for step in steps:
        rows = torch.randint(64, (8, 1), generator=torch.Generator().manual_seed(step))
        tokens = (rows + torch.arange(16)) % 64
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()  # the weights have stepped when it returns, and no gradient is left
        assert all(weight.grad is None for weight in model.parameters())
        optimizer.step()  # ends the step's books; schedulers hang on it
    return loss.item()


model, optimizer = new()
print(f"loss after 20 steps {train(model, optimizer, range(20)):.3f}")
file = io.BytesIO()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
went_on = train(model, optimizer, range(20, 40))

file.seek(0)
saved = torch.load(file, weights_only=True)
model, optimizer = new()
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
resumed = train(model, optimizer, range(20, 40))
print(f"loss after 40 steps {went_on:.3f}, resumed after 20 {resumed:.3f}")
assert resumed == went_on
