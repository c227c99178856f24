"""Your own model, optimizer, data and loop: the lines marked (+) are all that private training adds."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import privgrad as pg  # (+)


def main() -> float:
    """Train on two noisy clouds of points, privately. Returns the accuracy on the training points (they are not real people)."""
    torch.manual_seed(0)
    labels = torch.randint(2, (2000,))
    points = torch.randn(2000, 2) + 2 * labels[:, None]
    dataset = TensorDataset(points, labels)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    plan = pg.dp_sgd(dataset, epsilon=2, delta=1e-5, epochs=5, batch_size=200, max_norm=1.0)  # (+)
    private = pg.make_private(model, optimizer, dataset, plan, loss_fn=pg.supervised(F.cross_entropy))  # (+)
    for batch in private.batches():  # (+)
        private.step(batch)  # (+)

    print(private.spent())  # (+)
    accuracy = float((model(points).argmax(1) == labels).float().mean())
    print(f"accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
