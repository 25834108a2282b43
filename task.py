"""The example's task: a small CNN on MNIST digits."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

HELD_OUT = 1000  # the last digits of the data set are never trained on
_EVALUATION_BATCH = 500


class Net(nn.Module):
    """Two convolutions and two linear layers: 1.2 million parameters, 4.8 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 7 * 7, 376)
        self.fc2 = nn.Linear(376, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (n, 10) float32, of images, (n, 1, 28, 28) float32."""
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits


@dataclass(frozen=True, slots=True)
class Digits:
    """Hold images and labels.

    Attributes
    ----------
    images : Tensor
        (n, 1, 28, 28) float32, mean 0 and standard deviation 1 over MNIST.
    labels : Tensor
        (n,) int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def use_one_deterministic_thread() -> None:
    """Make the same training give the same bits, on any number of cores."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)


def new_net(seed: int = 0) -> Net:
    """Return a network whose initial weights depend on the seed alone."""
    torch.manual_seed(seed)
    return Net()


def load_partition(config: dict[str, object], partition: int, num_partitions: int) -> Digits:
    """Return the digits of one node; all nodes have the same number of them.

    Parameters
    ----------
    config : dict
        ``dataset`` (``mnist-5k`` ships with flwr_ha, ``mnist-full`` is downloaded by torchvision),
        ``partitioning`` (``iid`` or ``dirichlet``), ``dirichlet-alpha``, and ``data``, a file to
        use in place of the one that ships.
    partition : int
        Counts from 0.
    num_partitions : int
        Nodes that share the data.
    """
    if not 0 <= partition < num_partitions:
        raise ValueError(f"partition-id = {partition}: 0 to {num_partitions - 1} are possible")
    images, labels = _training_data(config)
    scheme = config.get("partitioning", "iid")
    if scheme == "iid":
        own = np.array_split(np.arange(len(labels)), num_partitions)[partition]
    elif scheme == "dirichlet":
        alpha = float(str(config.get("dirichlet-alpha", 0.5)))
        own = dirichlet_partitions(labels, num_partitions, alpha)[partition]
    else:
        raise ValueError(f'partitioning = {scheme!r} is neither "iid" nor "dirichlet"')
    return _digits(images[own], labels[own])


def load_held_out(config: dict[str, object]) -> Digits:
    """Return the digits that nobody trains on."""
    if config.get("dataset") == "mnist-full":
        return _digits(*_torchvision_mnist(is_train=False))
    images, labels = _shipped_mnist(config)
    return _digits(images[-HELD_OUT:], labels[-HELD_OUT:])


def dirichlet_partitions(
    labels: NDArray[np.uint8], num_partitions: int, alpha: float, *, seed: int = 0
) -> list[NDArray[np.int64]]:
    """Return indices for each partition: all of the same size, with skewed classes.

    Parameters
    ----------
    labels : ndarray
        (n,) uint8, 0 to 9.
    num_partitions : int
        How many.
    alpha : float
        Concentration; small values give each partition few classes.
    seed : int
        The same seed gives the same partitions.

    Notes
    -----
    Each partition draws its classes from a Dirichlet distribution, as in Hsu et al., "Measuring
    the Effects of Non-Identical Data Distribution" (https://arxiv.org/abs/1909.06335), section 3;
    from classes that are used up it takes what is left of the others.
    """
    if not alpha > 0:
        raise ValueError(f"dirichlet-alpha = {alpha}: more than 0 is needed")
    rng = np.random.default_rng(seed)
    pools = [list(rng.permutation(np.flatnonzero(labels == label))) for label in range(10)]
    shares = rng.dirichlet([alpha] * 10, size=num_partitions)
    parts: list[list[int]] = [[] for _ in range(num_partitions)]
    for _ in range(len(labels) // num_partitions):
        for part, share in zip(parts, shares, strict=True):
            left = share * [len(pool) > 0 for pool in pools]
            if not left.sum() > 0:
                left = np.array([float(len(pool)) for pool in pools])
            part.append(pools[rng.choice(10, p=left / left.sum())].pop())
    return [np.array(sorted(part), dtype=np.int64) for part in parts]


def train(net: Net, digits: Digits, *, config: dict[str, object], seed: list[int]) -> float:
    """Train in place; the same seed and weights give the same weights.

    Parameters
    ----------
    net : Net
        Changed in place.
    digits : Digits
        To train on.
    config : dict
        ``local-epochs``, ``batch-size``, ``learning-rate``.
    seed : list of int
        Decides the order of the digits.

    Returns
    -------
    float
        Mean loss of the last pass.
    """
    rng, batch = np.random.default_rng(seed), int(str(config["batch-size"]))
    optimizer = torch.optim.SGD(net.parameters(), lr=float(str(config["learning-rate"])), momentum=0.5)
    net.train()
    loss_sum = 0.0
    for _ in range(int(str(config["local-epochs"]))):
        loss_sum = 0.0
        order = torch.from_numpy(rng.permutation(len(digits)))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(digits.images[chosen]), digits.labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.item() * len(chosen)
    return loss_sum / len(digits)


def evaluate(net: Net, digits: Digits) -> tuple[float, float]:
    """Return the mean loss and the accuracy, 0 to 1."""
    net.eval()
    loss = hits = 0.0
    with torch.no_grad():
        for start in range(0, len(digits), _EVALUATION_BATCH):
            labels = digits.labels[start : start + _EVALUATION_BATCH]
            logits = net(digits.images[start : start + _EVALUATION_BATCH])
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            hits += (logits.argmax(1) == labels).sum().item()
    return loss / len(digits), hits / len(digits)


def _training_data(config: dict[str, object]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    match config.get("dataset", "mnist-5k"):
        case "mnist-5k":
            images, labels = _shipped_mnist(config)
            return images[:-HELD_OUT], labels[:-HELD_OUT]
        case "mnist-full":
            return _torchvision_mnist(is_train=True)
        case other:
            raise ValueError(f'dataset = {other!r} is neither "mnist-5k" nor "mnist-full"')


def _shipped_mnist(config: dict[str, object]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    file = config.get("data") or resources.files("flwr_ha") / "data" / "mnist-5k.npz"
    with np.load(str(file)) as data:
        return data["images"], data["labels"]


def _torchvision_mnist(*, is_train: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise RuntimeError(
            'dataset = "mnist-full" needs torchvision: pip install "flwr-ha[torchvision]", or use "mnist-5k"'
        ) from error
    try:
        data = MNIST(Path.home() / ".cache" / "flwr-ha" / "mnist", train=is_train, download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f'dataset = "mnist-full" cannot be downloaded ({error}); "mnist-5k" needs no network'
        ) from error
    return data.data.numpy(), data.targets.numpy().astype(np.uint8)


def _digits(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Digits:
    scaled = (torch.from_numpy(images.astype(np.float32)) / 255.0 - 0.1307) / 0.3081
    return Digits(scaled.unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))
