"""A hand-written federated loop, moved to LoRA.

FedAvg over ``get_parameters`` and ``set_parameters``, complete: four clients, real handwriting.
The loop is the same for a full model and for an adapter; what changes is marked.

    python examples/federated_loop.py
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from fedlora import CLIPLoRAWrapper, FederatedCLIPModel, LoRAConfig

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CLIENTS, ROUNDS, BATCH = 4, 3, 32

# Real digits as uint8 pictures; each client holds some classes more often than others.
found = load_digits()
images = np.round(found.images * 255 / 16).astype(np.uint8)
order = np.random.default_rng(0).permutation(len(images))
test, train = order[:300], order[300:1100]
shards = np.array_split(train[np.argsort(found.target[train] // 3, kind="stable")], CLIENTS)

torch.manual_seed(0)
model = FederatedCLIPModel("tiny-clip", num_classes=10, class_names=CLASSES)

# ---- The move to LoRA: these lines are new, the loop below is not. ----
config = LoRAConfig.for_clip_model(r=8, lora_alpha=16)
wrapper = CLIPLoRAWrapper(model, config, target_components=["encoder"])
wrapper.apply_lora_to_federated_model()
print(wrapper.report())
# -----------------------------------------------------------------------

server = model.get_parameters()
print(f"each client sends {sum(t.nbytes for t in server.values()):,} bytes a round")
print(f"round 0: {model.evaluate(images[test], found.target[test])['accuracy']:.4f} (zero-shot)")
for round_idx in range(ROUNDS):
    total = {name: torch.zeros_like(tensor) for name, tensor in server.items()}
    for rows in shards:
        model.set_parameters(server)
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            model.train_step(images[batch], found.target[batch], lr=1e-3)
        for name, tensor in model.get_parameters().items():
            total[name] += tensor * (len(rows) / len(train))
    server = total
    model.set_parameters(server)
    metrics = model.evaluate(images[test], found.target[test])
    print(f"round {round_idx + 1}: {metrics['accuracy']:.4f}")
