"""Where another framework owns `optimizer.step()`: `backward` fills `.grad` with the noised gradient and touches nothing else."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset

import privgrad as pg


class Framework:
    """Stands for a training framework that insists on stepping its optimizer and schedule itself."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.optimizer = optimizer
        self.schedule = CosineAnnealingLR(optimizer, steps)

    def after_backward(self) -> None:
        """Move the weights by what stands in `.grad`."""
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def main() -> float:
    """Train privately below a framework. Returns the accuracy on the training points (they are not real people)."""
    torch.manual_seed(0)
    labels = torch.randint(2, (2000,))
    points = torch.randn(2000, 2) + 2 * labels[:, None]
    dataset = TensorDataset(points, labels)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    plan = pg.dp_sgd(dataset, epsilon=2, delta=1e-5, epochs=5, batch_size=200)
    framework = Framework(optimizer, plan.steps)

    private = pg.make_private(model, optimizer, dataset, plan, loss_fn=pg.supervised(F.cross_entropy))
    for batch in private.batches():
        private.backward(batch)
        framework.after_backward()

    print(private.spent())
    accuracy = float((model(points).argmax(1) == labels).float().mean())
    print(f"accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
