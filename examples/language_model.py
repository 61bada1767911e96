"""Curvature of a Hugging Face language model over batches with padding.

The model computes its own loss. Batches are weighted by their number of valid labels, so that the
result is that of one large batch.

Run: python examples/language_model.py    (needs transformers; the weights are random)
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fasthessian as fh

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)
model = GPT2LMHeadModel(config)

batches = []
for lengths in ((12, 16), (5, 9), (16, 3)):
    ids = torch.randint(1, 64, (2, 16))
    valid = torch.arange(16) < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~valid, -100)  # the loss ignores -100
    batches.append({"input_ids": ids, "attention_mask": valid.long(), "labels": labels})

H = fh.Hessian(model, None, batches)  # None: the model returns its loss
print(f"{H.n} parameters; {H.engine}")
same = fh.Hessian(model, lambda model, batch: model(**batch).loss, batches)
v = torch.ones(H.n)
apart = float((H @ v - same @ v).norm() / (H @ v).norm())
print(f"the same loss as a function of (model, batch): products differ by {apart:.0e}")

top = fh.eigsh(H, 2)
print("Hessian:      largest in magnitude", ", ".join(f"{x:.4g}" for x in top.values.tolist()))
G = fh.GaussNewton(model, None, batches)  # positive semidefinite
top = fh.eigsh(G, 2)
print("Gauss-Newton: largest in magnitude", ", ".join(f"{x:.4g}" for x in top.values.tolist()))
