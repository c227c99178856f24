"""A loop of your own that looks at its model after each epoch, and that can be stopped and gone on with: run it again.

python -m examples.resumed_loop DIRECTORY
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import privgrad as pg

EPOCHS = 5


def main(directory: Path, epochs: int = EPOCHS) -> float:
    """Train up to `epochs` of five epochs, from where an earlier call stopped. Returns the accuracy on the training points."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (2000,), generator=generator)
    points = torch.randn(2000, 2, generator=generator) + 2 * labels[:, None]
    dataset = TensorDataset(points, labels)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)

    plan = pg.dp_sgd(dataset, epsilon=2, delta=1e-5, epochs=EPOCHS, batch_size=200, max_norm=1.0)
    directory.mkdir(parents=True, exist_ok=True)
    charged, checkpoint, partial = (
        directory / name for name in ("ledger.jsonl", "checkpoint.pt", "checkpoint.partial")
    )
    begun = charged.exists()
    ledger = pg.Ledger.resume(plan.terms(), charged) if begun else pg.Ledger(plan.terms(), charged)
    private = pg.make_private(model, optimizer, dataset, plan, pg.supervised(F.cross_entropy), ledger=ledger)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        private.load_state_dict(saved["private"])

    while ledger.count < plan.steps * epochs // EPOCHS:
        for batch in private.batches(steps=plan.steps // EPOCHS):
            private.step(batch)
        now = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "private": private.state_dict()}
        torch.save(now, partial)
        partial.replace(checkpoint)  # a stop in the middle of a write leaves the older one
        accuracy = float((model(points).argmax(1) == labels).float().mean())  # these points are not real people
        print(f"{private.spent()}, accuracy {accuracy:.1%}")
    ledger.close()
    return float((model(points).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "resumed_loop"))
