"""Write scikit-learn's breast cancer data as a CSV file, for breast_cancer.toml: 569 patients, 30 numbers each, a diagnosis.

.venv/bin/python examples/tables/breast_cancer.py
./privgrad train examples/tables/breast_cancer.toml
"""

from __future__ import annotations

import csv
from pathlib import Path

from sklearn.datasets import load_breast_cancer

HERE = Path(__file__).resolve().parent


def main(directory: Path = HERE) -> Path:
    """The file that was written."""
    data = load_breast_cancer()
    path = directory / "breast_cancer.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*data.feature_names, "diagnosis"])
        for numbers, label in zip(data.data.tolist(), data.target, strict=True):
            writer.writerow([*numbers, data.target_names[label]])
    return path


if __name__ == "__main__":
    print(main())
