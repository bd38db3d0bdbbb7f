"""`Layer2Layer`: the training loop of layer-to-layer-pytorch, on the executor that streams any model.

The class moves data, keeps what belongs to one forward pass until its backward, and scales gradients in mixed precision. Layers
are found, streamed and differentiated by `graphopt.passes.LayerToLayer`, and updated by any ``torch.optim`` optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.errors import OptionError, StreamError
from graphopt.passes import LayerToLayer
from graphopt.runtime.streaming.loss_scale import HALF_PRECISION, LossScale
from graphopt.runtime.streaming.stream import Direction
from graphopt.transform import records, stream, transform

_NO_LIST = (
    "It has none: put its layers into self.layers = nn.ModuleList([...]), or use graphopt.passes.LayerToLayer, which finds "
    "layers anywhere"
)

_State = Literal["new", "forward", "no gradients", "backward"]


class Layer2Layer:
    """Train a model whose layers stand in an ``nn.ModuleList``, with one layer at a time on the GPU.

    Parameters, gradients and the optimizer's state stay in host memory. `forward` brings each layer once for all micro-batches
    and keeps only what passes between layers; `backward` brings each again, recomputes and differentiates it;
    ``optimizer.step()`` works a few parameters at a time. It is the model's own ``forward`` that runs, so layers may be called in
    any order, share parameters, take several tensors, and be joined by modules outside the list.

    **The numbers are those of ordinary training**: losses and gradients of ``loss_fn(model(batch), targets)`` on the whole batch,
    whatever ``microbatch_size`` is and also where the last micro-batch is smaller. Nothing is averaged over micro-batches:
    ``reduction="mean"`` is the mean over the batch and ``reduction="sum"`` the sum. (The forerunner divided by the number of
    micro-batches, so that with ``"sum"`` it printed the batch's sum divided by ``len(batch) // microbatch_size``.) Layers in
    which samples meet, such as batch normalisation, take the whole batch and update their buffers once; `notes` names them.
    The loss itself is computed on the outputs of the whole batch.

    **Mixed precision.** With ``mixed_precision=True`` layers compute under ``torch.autocast``, in float16 on CUDA and in bfloat16
    on the CPU, and the loss in float32. Parameters, gradients and the optimizer's state are float32. What backward sends into the
    layers is multiplied by ``loss_scale``, and their gradients are divided by it before they are added to those in the store: no
    gradient has to be unscaled. As with ``GradScaler``, a gradient that is not finite makes the next ``optimizer.step()`` do
    nothing: all gradients are dropped, also those of other backward passes until `zero_grad` or ``step()``, ``loss_scale`` is
    halved, and a warning says so. (It never grows by itself; it may be set at any time.)

    Args:
        model: float32 with ``mixed_precision``. It is transformed in place; `graphopt.restore` undoes that.
        layers_attr: path of the ``nn.ModuleList`` in the model.
        microbatch_size: samples that a layer computes at once; ``None``: the whole batch.
        mixed_precision: compute in half precision.
        loss_scale: first loss scale; has an effect only with ``mixed_precision``.
        gpu_device: where layers compute. ``None``: where the model is, or on the GPU if it is on the CPU and there is one.
        verbose: show progress over the layers of each pass with tqdm, where the output is a terminal.
        compiler: as in `graphopt.transform`.

    Attributes:
        main_model: the model.
        layers_attr: as above, like the others that follow.
        microbatch_size: see there.
        mixed_precision: see there.
        verbose: see there.
        gpu_device: where layers compute.
        num_skipped: backward passes whose gradients were dropped.

    Raises:
        OptionError: an option has no meaning, or the model no such list.

    Example:
        >>> class Tower(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)])
        ...     def forward(self, x):
        ...         for layer in self.layers:
        ...             x = layer(x)
        ...         return x
        >>> model = Tower()
        >>> for weight in model.parameters():
        ...     _ = nn.init.ones_(weight)
        >>> l2l = Layer2Layer(model, microbatch_size=2, gpu_device="cpu", compiler="eager")
        >>> x, y = torch.ones(3, 2), torch.zeros(3, 1)
        >>> l2l.forward(x).tolist()
        [[4.0], [4.0], [4.0]]
        >>> l2l.backward(x, y, nn.MSELoss(reduction="sum")).item()
        48.0
        >>> torch.optim.SGD(l2l.main_params, lr=2**-6).step()
        >>> l2l.main_model.state_dict()["layers.1.weight"].tolist()
        [[0.25, 0.25]]

    Reference: Pudipeddi, Mesmakhosroshahi, Xi, Bharadwaj, "Training Large Neural Networks with Constant Memory using a New
    Execution Algorithm", arXiv:2002.05645, 2020. Interface: layer-to-layer-pytorch 0.3.0.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers_attr: str = "layers",
        microbatch_size: int | None = None,
        mixed_precision: bool = False,
        loss_scale: float = 128.0,
        gpu_device: torch.device | str | None = None,
        verbose: bool = False,
        compiler: str = "inductor",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"Layer2Layer takes a torch.nn.Module and got {type(model).__name__}")
        self._num_layers = len(_layers(model, layers_attr))
        _check_microbatch_size(microbatch_size)
        self._loss_scale = LossScale(loss_scale)
        if not mixed_precision and loss_scale != 128.0:
            warnings.warn(
                f"Layer2Layer(loss_scale={loss_scale}) has no effect without mixed_precision=True",
                UserWarning,
                stacklevel=2,
            )
        if mixed_precision:
            _check_float32(model)
        self.gpu_device = _device(gpu_device, model)
        self._progress = _Progress() if verbose else None
        self.main_model = model
        self.layers_attr, self.microbatch_size = layers_attr, microbatch_size
        self.mixed_precision, self.verbose = mixed_precision, verbose
        self.num_skipped = 0
        self._state: _State = "new"
        self._pending: _Pending | None = None
        streaming = LayerToLayer((layers_attr,), device=self.gpu_device, store="cpu", microbatch_size=microbatch_size)
        transform(model, [streaming], compiler=compiler)
        self._stream = stream(model)

    # -------------------------------------------------------------------------------------------------------- one step

    def zero_grad(self) -> None:
        """Clear all gradients."""
        self.main_model.zero_grad()
        self._loss_scale.forgive()

    def forward(self, batch: Any, **kwargs: Any) -> Any:
        """Run the model, and keep what `backward` needs; what an earlier call kept is freed.

        Args:
            batch: first argument of the model's ``forward``; tensors in it, and in ``kwargs``, are brought to `gpu_device`.
            kwargs: its other arguments.

        Returns:
            What the model returns, on `gpu_device`, without gradients. In mixed precision float32.
        """
        self._stream.check()
        self._state, self._pending = "new", None
        with self._observed(), self._autocast():
            outputs = self.main_model(*self._enter((batch,)), **self._enter(kwargs))
        if self.mixed_precision:
            outputs = self._loss_scale.leave(outputs)
        if torch.is_grad_enabled():
            self._state, self._pending = "forward", _Pending(batch, outputs)
        else:
            self._state = "no gradients"
        return pytree.tree_map_only(Tensor, Tensor.detach, outputs)

    def compute_loss(self, targets: Any, loss_fn: Callable[..., Tensor], **kwargs: Any) -> Tensor:
        """The loss of the last `forward`, for the `backward` that follows.

        Args:
            targets: second argument of ``loss_fn``; tensors in it are brought to `gpu_device`.
            loss_fn: function of what the model returns and of ``targets``; returns one number.
            kwargs: its other arguments.

        Returns:
            The loss, without gradients, shape ().

        Raises:
            StreamError: there is no forward pass to compute it for, or its loss is computed already.
        """
        pending = self._waiting("compute_loss")
        if pending.loss is not None:
            raise StreamError(
                "compute_loss a second time for one forward(batch): it is not clear which of the losses backward() is for. Add "
                "them up in one loss_fn, or compute what is only printed from what forward returned"
            )
        with torch.enable_grad():
            loss = loss_fn(pending.outputs, self._move(targets), **kwargs)
        pending.loss = _checked(loss)
        return pending.loss.detach()

    def backward(
        self, batch: Any = None, targets: Any = None, loss_fn: Callable[..., Tensor] | None = None, **kwargs: Any
    ) -> Tensor:
        """Add the gradients of the last `forward` to those of the parameters.

        Without arguments the loss is that of `compute_loss`; with all three it is computed first.

        Args:
            batch: what `forward` was called with.
            targets: as in `compute_loss`.
            loss_fn: as in `compute_loss`.
            kwargs: as in `compute_loss`.

        Returns:
            The loss, without gradients, shape ().

        Raises:
            StreamError: there is no forward pass, or none of this batch, or no loss; or gradients are not finite, and no loss
                scale can help.
        """
        pending = self._waiting("backward")
        if loss_fn is not None:
            if not _same(batch, pending.batch):
                raise StreamError(
                    "backward(batch, targets, loss_fn) got another batch than the last forward(batch), whose layers it would "
                    "differentiate. Call forward with this batch first"
                )
            self.compute_loss(targets, loss_fn, **kwargs)
        elif batch is not None or targets is not None or kwargs:
            raise OptionError(
                "backward takes all of (batch, targets, loss_fn), or nothing after compute_loss(targets, loss_fn)"
            )
        loss = pending.loss
        if loss is None:
            raise StreamError(
                "backward() without a loss: call compute_loss(targets, loss_fn) first, or backward(batch, targets, loss_fn)"
            )
        self._state, self._pending = "backward", None
        with self._observed():
            loss.backward()
        loss = loss.detach()
        if self.mixed_precision:
            is_accepted = False
            try:
                is_accepted = self._loss_scale.accepts(loss, self._stream.step)
            finally:
                if not is_accepted:
                    self.main_model.zero_grad()
                    self.num_skipped += 1
        return loss

    # --------------------------------------------------------------------------------------------------------- queries

    @property
    def main_params(self) -> list[nn.Parameter]:
        """The trainable parameters of `main_model`, for an optimizer."""
        return [param for param in self.main_model.parameters() if param.requires_grad]

    def update_main_model_params(self) -> None:
        """Check that the parameters are still in the store; there is nothing to copy, since `main_params` are the model's own.

        Raises:
            StreamError: a parameter was replaced, or the streaming undone.
        """
        self._stream.check()

    @property
    def loss_scale(self) -> float:
        """By how much gradients are multiplied while they are in half precision."""
        return self._loss_scale.value

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._loss_scale.value = value

    @property
    def num_layers(self) -> int:
        """Length of the list of layers."""
        return self._num_layers

    @property
    def notes(self) -> list[str]:
        """What there is to know about the layers: the regions that are streamed, and which take the whole batch and why.

        Empty before the first `forward`, which captures the model.
        """
        passes = [found for record in records(self.main_model) for found in record.passes]
        notes = [note for found in passes if found.name == LayerToLayer.name for note in found.result.notes]
        return list(dict.fromkeys(notes))

    def __len__(self) -> int:
        return self._num_layers

    def __repr__(self) -> str:
        kind = type(self.main_model).__name__
        half = f", {HALF_PRECISION[self.gpu_device.type]}, loss_scale={self.loss_scale}" if self.mixed_precision else ""
        size = f", microbatch_size={self.microbatch_size}"
        return f"Layer2Layer({kind}.{self.layers_attr}, {len(self)} layers, {self.gpu_device}{size}{half})"

    # -------------------------------------------------------------------------------------------------------- privately

    def _waiting(self, caller: str) -> _Pending:
        """The forward pass that ``caller`` is for."""
        if self._pending is not None:
            return self._pending
        why = {
            "new": f"{caller} before forward",
            "forward": "",
            "no gradients": f"{caller} after a forward under torch.no_grad(), which keeps nothing",
            "backward": f"{caller} after backward, which has freed what forward had kept",
        }[self._state]
        raise StreamError(f"{why}: call forward(batch) first, with gradients enabled, once for each backward")

    def _move(self, values: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda value: value.to(self.gpu_device), values)

    def _enter(self, values: Any) -> Any:
        """The model's inputs on the device."""
        moved = self._move(values)
        return self._loss_scale.enter(moved) if self.mixed_precision else moved

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = self.gpu_device.type
        return torch.autocast(kind, dtype=HALF_PRECISION[kind]) if self.mixed_precision else nullcontext()

    @contextmanager
    def _observed(self) -> Iterator[None]:
        """Watch the stream while it works for this object, and only then: the model may be called by itself too."""
        self._stream.on_stage = self._progress
        self._stream.on_gradient = self._loss_scale.divide if self.mixed_precision else None
        try:
            yield
        finally:
            self._stream.on_stage = self._stream.on_gradient = None
            if self._progress is not None:
                self._progress.close()


@dataclass
class _Pending:
    """A forward pass whose backward has not come."""

    batch: Any
    outputs: Any
    loss: Tensor | None = None


class _Progress:
    """A bar that runs once over the stages of each pass."""

    def __init__(self) -> None:
        try:
            self._tqdm = import_module("tqdm.auto").tqdm
        except ImportError as error:
            raise OptionError(
                "Layer2Layer(verbose=True) shows progress with tqdm, which is not installed: pip install tqdm, or verbose=False"
            ) from error
        self._bar: Any = None

    def __call__(self, direction: Direction, number: int, num_stages: int) -> None:
        if number == 0:  # also where a graph break has made a second graph
            self.close()
            name = "Layers" if direction == "forward" else "Reverse layers"
            self._bar = self._tqdm(total=num_stages, desc=name, leave=False, disable=None)  # only on a terminal
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _layers(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        found: Any = model.get_submodule(path)
    except (AttributeError, TypeError):
        found = None
    if isinstance(found, nn.ModuleList) and len(found):
        return found
    kind = type(model).__name__
    is_what = f"is an nn.{type(found).__name__}" if isinstance(found, nn.Module) else "does not exist"
    if isinstance(found, nn.ModuleList):
        is_what = "is empty"
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    there = f"It has {', '.join(lists)}" if lists else _NO_LIST
    raise OptionError(
        f"Layer2Layer(layers_attr={path!r}): {kind}.{path} {is_what}; it names the nn.ModuleList of layers. {there}"
    )


def _check_microbatch_size(size: Any) -> None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise OptionError(
            f"Layer2Layer(microbatch_size={size!r}): it is an int, at least 1, or None for the whole batch at once"
        )


def _check_float32(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if param.is_floating_point() and param.dtype != torch.float32:
            raise OptionError(
                f"Layer2Layer(mixed_precision=True) keeps parameters in float32 and computes in half precision, and {name} is "
                f"{param.dtype}: call model.float() first"
            )


def _device(wanted: torch.device | str | None, model: nn.Module) -> torch.device:
    own = next((param.device for param in model.parameters()), torch.device("cpu"))
    if wanted is None:
        wanted = "cuda" if own.type == "cpu" and torch.cuda.is_available() else own
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"Layer2Layer(gpu_device={wanted!r}): it is 'cuda', 'cuda:1' or 'cpu'") from error
    if device.type not in HALF_PRECISION:
        raise OptionError(
            f"Layer2Layer(gpu_device={str(device)!r}): layers compute on 'cuda', 'cuda:1', ... or on 'cpu'"
        )
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= (device.index or 0):
        there = "torch finds no CUDA device" if count == 0 else f"torch finds {count} CUDA devices, from cuda:0"
        raise OptionError(f"Layer2Layer(gpu_device={str(device)!r}): {there}; gpu_device='cpu' computes in main memory")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise StreamError(f"loss_fn returned {got}; it must return one number: reduction='mean' or 'sum', not 'none'")
    if not loss.requires_grad:
        raise StreamError(
            "loss_fn returned a number that does not depend on what the model returned, so there are no gradients"
        )
    return loss.reshape(())


def _same(batch: Any, other: Any) -> bool:
    """Whether two batches are one, or hold the same values."""
    if batch is other:
        return True
    values, structure = pytree.tree_flatten(batch)
    others, other_structure = pytree.tree_flatten(other)
    if structure != other_structure:
        return False
    return all(_same_leaf(value, own) for value, own in zip(values, others, strict=True))


def _same_leaf(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other.to(value.device))
    return isinstance(value, int | float | str) and isinstance(other, int | float | str) and value == other
