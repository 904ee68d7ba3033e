"""Programs that train a recipe with torch, for the benchmark: `python -m torch_ref.baselines NAME RECIPE` serves one.

None is tuned beyond its name. `lesson` is the lesson's program, with torchvision's data set and a DataLoader; the
others keep the tensors in memory and gather a batch a step: `eager` as it stands, `channels_last` with that memory
layout, `compile` with the network through `torch.compile`. All compute in float32.
"""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import argparse
import itertools
from collections.abc import Iterator

import torch
from torch import nn

from spec import bench_worker, params
from spec import recipe as recipes
from spec.batches import count, epoch_order
from spec.bench_worker import without_dropout
from spec.recipe import Recipe
from torch_ref import convert, data, lesson, models, optim
from torch_ref.objective import example_losses
from torch_ref.trainer import select_device

BASELINES = ("lesson", "eager", "channels_last", "compile")
Batch = tuple[torch.Tensor, torch.Tensor]


class InMemory:
    """A plain loop over tensors in memory."""

    def __init__(self, recipe: Recipe, name: str, device: torch.device) -> None:
        dataset = data.load(recipe.data)
        self.recipe, self.name, self.device = recipe, name, device
        self.counts = count(recipe, len(dataset.train.labels))
        self.shape, self.outputs = dataset.input_shape, params.num_outputs(recipe, dataset.num_classes)
        tensors = data.preprocess(dataset, recipe.preprocessing, dtype=torch.float32)[0].tensors
        self.images, self.labels = (tensor.to(device) for tensor in tensors)
        if name == "channels_last":
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.network, self.optimizer = self._start(recipe)
        # A scheduler wraps every step of the optimiser: where nothing is scheduled, there is none.
        self.scheduler = optim.scheduler(recipe, self.optimizer) if recipe.schedule.name != "constant" else None
        # The first turn, which does not count, ends an epoch: a short batch compiles then and not later.
        self.taken = max(self.counts.steps_per_epoch - 2, 0)
        self.coming = itertools.islice(self._batches(), self.taken, None)

    def first_losses(self, steps: int) -> list[float]:
        """Return the losses of the first steps, without dropout."""
        network, optimizer = self._start(without_dropout(self.recipe))
        return [self._step(network, optimizer, *batch).item() for batch in itertools.islice(self._batches(), steps)]

    def train(self, steps: int) -> None:
        """Train `steps` more steps."""
        for images, labels in itertools.islice(self.coming, steps):
            self._step(self.network, self.optimizer, images, labels)
            self.taken += 1
            if self.scheduler and self.taken % self.counts.steps_per_epoch == 0:
                self.scheduler.step()
        wait(self.device)

    def _start(self, recipe: Recipe) -> tuple[nn.Module, torch.optim.Optimizer]:
        network = models.network(recipe.model, self.shape, self.outputs)
        leaves = params.leaves(recipe.model, self.shape, self.outputs)
        convert.load_state(network, params.initial_state(leaves, recipe.init, recipe.seed))
        network.to(self.device)
        if self.name == "channels_last":
            network = network.to(memory_format=torch.channels_last)
        optimizer = optim.optimizer(recipe, network.parameters())
        network.train()
        return torch.compile(network) if self.name == "compile" else network, optimizer

    def _batches(self) -> Iterator[Batch]:
        for epoch in itertools.count(1):
            order = torch.from_numpy(epoch_order(self.recipe.seed, epoch, self.counts.num_examples)).to(self.device)
            for batch in order[: self.counts.examples_per_epoch].split(self.counts.batch_size):
                yield self.images[batch], self.labels[batch]

    def _step(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        optimizer.zero_grad()
        losses = example_losses(network(images), labels, self.recipe.loss)
        loss = losses.mean()
        (loss if self.recipe.loss.reduction == "mean" else losses.sum()).backward()
        optimizer.step()
        return loss.detach()


class Lesson:
    """The lesson's loop over its DataLoader."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.loader = lesson.batches(recipe, train=True)
        self.model, self.optimizer = lesson.network(recipe, device)
        self.coming = itertools.chain.from_iterable(self.loader for _ in itertools.count())

    def first_losses(self, steps: int) -> list[float]:
        """Return the losses of the first steps, without dropout: the loader's data set in the specified order."""
        recipe = without_dropout(self.recipe)
        model, optimizer = lesson.network(recipe, self.device)
        leaves = params.leaves(recipe.model, lesson.IMAGE_SHAPE, lesson.NUM_CLASSES)
        convert.load_state(model, params.initial_state(leaves, recipe.init, recipe.seed))
        order = epoch_order(recipe.seed, 1, len(self.loader.dataset)).tolist()
        size, losses = recipe.batch_size, []
        for start in range(0, steps * size, size):
            images, labels = self.loader.collate_fn([self.loader.dataset[i] for i in order[start : start + size]])
            model.train()
            with torch.no_grad():
                losses.append(nn.CrossEntropyLoss()(model(images.to(self.device)), labels.to(self.device)).item())
            lesson.train_epoch(model, optimizer, [(images, labels)])
        return losses

    def train(self, steps: int) -> None:
        """Train `steps` more steps."""
        lesson.train_epoch(self.model, self.optimizer, itertools.islice(self.coming, steps))
        wait(self.device)


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; the CPU has already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def program(name: str, recipe: Recipe, device: torch.device) -> bench_worker.Program:
    """Return the program of that name, ready to train."""
    return Lesson(recipe, device) if name == "lesson" else InMemory(recipe, name, device)


def main() -> None:
    """Serve one of them."""
    parser = argparse.ArgumentParser(prog="python -m torch_ref.baselines", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=BASELINES)
    parser.add_argument("recipe", help="a recipe's name or file")
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"))
    arguments = parser.parse_args()
    recipe = recipes.load(arguments.recipe)
    bench_worker.serve(lambda: program(arguments.name, recipe, select_device(arguments.platform)))
