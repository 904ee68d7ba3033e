"""The lesson's own program: torchvision's data set, a shuffling DataLoader, a loop over batches, one process.

`python -m torch_ref.lesson [--recipe NAME] [--epochs N] [--platform PLATFORM]` trains a recipe as the lesson does, with
torch's own initialisation and order, and prints each epoch's training accuracy and the test accuracy. It is what speed
is measured against, so nothing in it is tuned.
"""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import argparse
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader

from spec import recipe as recipes
from spec.datasets import cache, sources
from spec.datasets.catalog import IDX_SETS
from spec.errors import RecipeError
from spec.recipe import Loss, Recipe
from torch_ref import models, optim
from torch_ref.trainer import select_device
from torch_ref.vision import torchvision

IMAGE_SHAPE, NUM_CLASSES = (28, 28, 1), 10
LOSS = Loss(name="cross_entropy", reduction="mean", label_smoothing=0.0)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m torch_ref.lesson", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", default="mlp128", help="a recipe on idx data (default: mlp128)")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own")
    parser.add_argument("--platform", choices=("cpu", "gpu"), help="default: a GPU if there is one")
    arguments = parser.parse_args()
    recipe = recipes.load(arguments.recipe)
    torch.manual_seed(recipe.seed)
    model, optimizer = network(recipe, select_device(arguments.platform))
    train_batches, test_batches = (batches(recipe, train=train) for train in (True, False))
    for epoch in range(1, (arguments.epochs or recipe.epochs) + 1):
        start = time.perf_counter()
        accuracy = train_epoch(model, optimizer, train_batches)
        print(f"epoch {epoch}: train accuracy {accuracy:.4f}, {time.perf_counter() - start:.2f} s")
    print(f"test accuracy {evaluate(model, test_batches):.4f}")


def network(recipe: Recipe, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the recipe's network as torch draws it, on `device`, and its update rule."""
    model = models.network(recipe.model, IMAGE_SHAPE, NUM_CLASSES).to(device)
    return model, optim.optimizer(recipe, model.parameters())


def batches(recipe: Recipe, *, train: bool) -> DataLoader:
    """Return the lesson's DataLoader over torchvision's data set in the shared cache."""
    idx_set = IDX_SETS.get(recipe.data.name)
    if idx_set is None or recipe.loss != LOSS:
        raise RecipeError(
            f"{recipe.name} reads {recipe.data.name} and minimises {recipe.loss.name}, {recipe.loss.reduction}; the "
            "lesson's loop reads fashion_mnist and mnist and minimises the mean cross_entropy; try mlp128"
        )
    sources.ensure(idx_set)
    transforms = torchvision.transforms
    steps = [transforms.ToTensor()]
    if (recipe.preprocessing.mean, recipe.preprocessing.std) != (0, 1):
        steps.append(transforms.Normalize(recipe.preprocessing.mean, recipe.preprocessing.std))
    dataset = getattr(torchvision.datasets, idx_set.folder)(
        cache.root(), train=train, transform=transforms.Compose(steps), download=False
    )
    drop_last = train and recipe.last_batch == "drop"
    return DataLoader(dataset, batch_size=recipe.batch_size, shuffle=train, drop_last=drop_last)


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> float:
    """Train over every batch of `loader`; return the accuracy on the forward passes."""
    objective, device = nn.CrossEntropyLoss(), next(model.parameters()).device
    model.train()
    correct = seen = 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        logits = model(images)
        loss = objective(logits, labels)
        loss.backward()
        optimizer.step()
        correct += (logits.argmax(1) == labels).sum().item()
        seen += len(labels)
    return correct / seen


def evaluate(model: nn.Module, loader: DataLoader) -> float:
    """Return the accuracy over every example of `loader`."""
    model.eval()
    return sum(_correct(model, loader)) / len(loader.dataset)


@torch.no_grad()
def _correct(model: nn.Module, loader: DataLoader) -> Iterator[int]:
    device = next(model.parameters()).device
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        yield (model(images).argmax(1) == labels).sum().item()
