"""A convolutional network with BatchNorm, trained privately: its statistics are noised, and charged with the gradient."""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import privgrad as pg


def network() -> nn.Module:
    """Two convolutions with BatchNorm, for images of 8 x 8 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def main(directory: Path) -> pg.Result:
    """Train at epsilon 3 on the handwritten digits of scikit-learn, and print what the certificate says of the statistics."""
    torch.manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(digits.target)[order]
    training = TensorDataset(images[:1437], labels[:1437])
    test = pg.DeclaredSplit(TensorDataset(images[1437:], labels[1437:]))

    report = pg.nn.convert(network(), to="private_statistics")
    print(report)
    plan = pg.Plan(
        sampling=pg.PoissonSampling(expected_batch_size=512, dataset_size=len(training)),
        steps=150,
        statistics=pg.PrivateStatistics(),
    ).calibrate(epsilon=3, delta=1e-5)
    optimizer = torch.optim.SGD(report.model.parameters(), lr=2.0)
    loss_fn = pg.supervised(F.cross_entropy)
    trainer = pg.Trainer(report.model, optimizer, training, plan, loss_fn, directory=directory, test=test, quiet=True)
    result = trainer.fit()
    print(f"test accuracy {result.test_accuracy:.1%} at epsilon {result.epsilon:.3f}")
    print(plan.words["statistics"])
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name) / "run")
