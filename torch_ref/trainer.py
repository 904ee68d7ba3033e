"""A whole run in torch: recipe and data set -> initial state -> epochs -> events."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

import spec.run.trainer
from spec import params
from spec.batches import count, epoch_order
from spec.datasets import Dataset
from spec.errors import UserError
from spec.recipe import Recipe
from spec.run.history import StepsDone
from spec.run.trainer import Cancelled, Implementation, Tested
from torch_ref import checkpoint, convert, data, models, optim
from torch_ref.checkpoint import Snapshot
from torch_ref.step import eval_step, train_step

OPTIMIZER = "optimizer."  # goes before the names of its state in a snapshot


class Trainer(spec.run.trainer.Trainer):
    """One run of `recipe` over `dataset` (raw, as `torch_ref.data.load` gives it), ready on `device`.

    With `skips`, a step that makes a number infinite or nan is left out. Raises RecipeError or DataError when the
    recipe and the data do not fit.
    """

    compile_seconds = 0.0

    def __init__(self, recipe: Recipe, dataset: Dataset, device: torch.device, *, skips: bool = False) -> None:
        outputs = params.num_outputs(recipe, dataset.num_classes)
        self.recipe = recipe
        self.device = device
        self.skips = skips
        self.counts = count(recipe, len(dataset.train.labels))
        self.leaves = params.leaves(recipe.model, dataset.input_shape, outputs)
        dtype = torch.float64 if recipe.precision == "float64" else torch.float32
        self.train_split, *rest = data.preprocess(dataset, recipe.preprocessing, dtype=dtype)
        self.test_split = rest[0] if rest else None
        self.test_labels = self.test_split.tensors[1].numpy() if self.test_split else None
        self.network = models.network(recipe.model, dataset.input_shape, outputs).to(device, dtype)
        convert.load_state(self.network, params.initial_state(self.leaves, recipe.init, recipe.seed))
        self.optimizer = optim.optimizer(recipe, self.network.parameters())
        self.scheduler = optim.scheduler(recipe, self.optimizer)
        self.steps = self.updates = 0

    def launch(self, epoch: int, start: int, stop: int) -> Callable[[], StepsDone]:
        """Return what trains the steps [start, stop) of `epoch`."""
        return lambda: self._train(epoch, start, stop)

    def evaluate(self, cancelled: Callable[[], bool] = lambda: False) -> Tested:
        """Return loss [n] and predicted class [n] of each test example as the network is now; None without a split."""
        if self.test_split is None:
            return None, None
        inputs, labels = (tensor.to(self.device).split(self.recipe.batch_size) for tensor in self.test_split.tensors)
        parts = []
        with self._autocast():
            for batch in zip(inputs, labels, strict=True):
                if cancelled():
                    raise Cancelled
                parts.append(eval_step(self.network, *batch, self.recipe.loss))
        losses, predictions = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        return losses, predictions

    def state(self) -> dict[str, np.ndarray]:
        """Return the present parameters and running statistics, canonical names and layouts (`spec.params`)."""
        return convert.state(self.network)

    def snapshot(self) -> Snapshot:
        """Return the state and the optimiser's, canonical, and the `steps` done; the schedule goes by those."""
        opt_state = convert.optimizer_state(self.optimizer, self.network, self.updates)
        arrays = {f"{OPTIMIZER}{name}": array for name, array in opt_state.items()}
        return self.state() | arrays | {"steps": np.array(self.steps)}

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot, bit for bit."""
        opt_state = {name.removeprefix(OPTIMIZER): of for name, of in snapshot.items() if name.startswith(OPTIMIZER)}
        convert.load_state(self.network, {leaf.name: snapshot[leaf.name] for leaf in self.leaves})
        self.optimizer = optim.optimizer(self.recipe, self.network.parameters())
        convert.load_optimizer(self.optimizer, self.network, opt_state)
        self.steps, self.updates = int(snapshot["steps"]), int(opt_state["step"])
        self.scheduler = optim.scheduler(self.recipe, self.optimizer)
        for _ in range(self.steps // self.counts.steps_per_epoch):
            self._end_epoch()

    def named(self, snapshot: Snapshot) -> Snapshot:
        """Return the arrays of a snapshot: the canonical state, then the optimiser's as `optimizer.NAME`."""
        return snapshot

    def _train(self, epoch: int, start: int, stop: int) -> StepsDone:
        order = epoch_order(self.recipe.seed, epoch, self.counts.num_examples)
        metrics = []
        for step, batch in enumerate(data.batches(self.train_split, self.counts, order, start=start, stop=stop), start):
            seed_dropout(self.recipe, epoch, step)
            metrics.append(self._step(*(tensor.to(self.device) for tensor in batch)))
            self.steps += 1
            if step + 1 == self.counts.steps_per_epoch:
                self._end_epoch()
        losses, num_correct = (np.array(column) for column in zip(*metrics, strict=True))
        return StepsDone(
            epoch=epoch,
            start=start,
            stop=stop,
            losses=losses,
            num_correct=num_correct,
            finite=self._is_finite(),
        )

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
        """Train one step, or leave it out."""
        before = self.snapshot() if self.skips else None
        with self._autocast():
            loss, num_correct = train_step(self.network, self.optimizer, images, labels, self.recipe.loss)
        self.updates += 1
        if before and not (np.isfinite(loss) and self._is_finite()):
            self.restore(before)
            return math.nan, num_correct
        return loss, num_correct

    def _end_epoch(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that this optimiser has not made a step yet
            self.scheduler.step()

    def _is_finite(self) -> bool:
        return all(np.isfinite(array).all() for array in self.snapshot().values())

    def _autocast(self) -> AbstractContextManager:
        """Return the scope of bfloat16 products over float32 parameters, if the recipe asks for it."""
        if self.recipe.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def prepare(recipe: Recipe, device: torch.device, *, skips: bool = False) -> Callable[[Dataset], Trainer]:
    """Return what makes a trainer of a data set; torch has nothing to do before."""
    return lambda dataset: Trainer(recipe, dataset, device, skips=skips)


def seed_dropout(recipe: Recipe, epoch: int, step: int) -> None:
    """Give the step masks of its own that depend on (seed, epoch, step) alone (S7)."""
    if recipe.model.dropout:
        torch.manual_seed(int(np.random.SeedSequence([recipe.seed, epoch, step]).generate_state(1)[0]))


def select_device(platform: str | None) -> torch.device:
    """Return the device of `platform`, or a GPU if there is one, else the CPU; products at full width (S12).

    Raises UserError when torch does not have it here.
    """
    there = {"cpu": "cpu"} | ({"gpu": "cuda"} if torch.cuda.is_available() else {})
    if platform and platform not in there:
        raise UserError(f"--platform {platform} is not one that torch has here ({', '.join(there)}); leave it out")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(there.get(platform or "gpu", "cpu"))


@contextmanager
def memory_explained() -> Iterator[None]:
    """Turn the device's refusal of memory into a UserError."""
    try:
        yield
    except RuntimeError as error:
        # On a GPU torch.OutOfMemoryError, which is one; on the CPU nothing but the allocator's name tells.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"the device has too little memory: {reason}; use a smaller --batch-size or network") from None


IMPLEMENTATION = Implementation(
    framework="torch",
    packages=("torch", "torchvision"),
    select_device=select_device,
    describe_devices=lambda device: [str(device)],
    load=data.load,
    prepare=prepare,
    memory_explained=memory_explained,
    write_state=checkpoint.write,
    read_state=lambda trainer, folder: checkpoint.read(folder, like=trainer.snapshot()),
)
