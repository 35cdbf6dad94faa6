"""mnemo for a plain PyTorch loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from mnemo.config import load_config
from mnemo.errors import ModelChangedError
from mnemo.session import announce, prefetch, report
from mnemo.session.attributes import AttributeWatch
from mnemo.session.exactness import first_sum_differs
from mnemo.session.finder import Restored
from mnemo.session.fingerprints import (
    data_fingerprint,
    group_fingerprints,
    optimizer_fingerprint,
    scheduler_fingerprint,
    script_fingerprint,
    structure_fingerprint,
)
from mnemo.session.identity import does_not_load, flexible_names
from mnemo.session.keeper import End, Keeper
from mnemo.session.modules import ModuleTree
from mnemo.session.passes import LoaderPosition
from mnemo.session.place import current_place, next_fit, shared_identity
from mnemo.session.replacing import Replicas
from mnemo.session.stop import leave, on_sigterm
from mnemo.session.unsaved import Unsaved, restore_wrapper, wrapper_state
from mnemo.smp.board import Position
from mnemo.snapshot.listing import (
    MODULE_PARTS,
    join_module_state,
    module_state,
    optimizer_state,
    restore_optimizer,
    tensors_of,
)


class Session:
    """Snapshots and exact resume for a training loop of your own.

    ::

        run = mnemo.Session("mnemo.yaml", model=model, optimizer=optimizer, scheduler=scheduler)
        for batch in run.batches(loader, epochs=3):
            loss = model(batch).loss
            loss.backward()
            run.step()

    Every rank makes one, after ``init_process_group`` and after wrapping the model.
    """

    def __init__(
        self,
        config: str | Path | None = None,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        objects: Mapping[str, Any] | None = None,
        **sections: Mapping[str, Any],
    ) -> None:
        """Open the session. Nothing is restored before `batches` begins.

        In a restarted rank the newest snapshot is read meanwhile, in the background.

        Args:
            config: YAML file; None reads the environment and defaults only.
            model: The model, wrapped or not.
            optimizer: Stepped by `step`.
            scheduler: Stepped after the optimizer, if given.
            objects: Anything else with ``state_dict`` and ``load_state_dict``, by name.
            sections: Settings as arguments: ``snapshot={"every": 10}``.

        Raises:
            ConfigError: A setting is wrong.
        """
        self._config = load_config(config, **sections)
        prefetch.begin(self._config)
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._objects = dict(objects or {})
        self._tree = ModuleTree(model)
        self._attributes = AttributeWatch("use objects=…")
        self._keeper: Keeper | None = None
        self._data: LoaderPosition | None = None
        self._step = 0
        self._epoch = 0
        self._commits = 0
        self._stepped: tuple[torch.Tensor | None] | None = None
        """The loss of a step whose batch is not through yet."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the whole run, earlier lives included."""
        return self._step

    @property
    def epoch(self) -> int:
        """The current pass over the data, from 0."""
        return self._epoch

    def batches(self, loader: Iterable[Any], epochs: int = 1) -> Iterator[Any]:
        """Yield the batches of ``epochs`` passes, from where the last life ended.

        A step is committed when the next batch is asked for, so that a resume goes on with all
        that the loop's body did: a moving average, an evaluation, its random numbers.

        When the last one is through, the training is finished. Its newest snapshot is kept until
        the program has ended well, too: after a crash in its last save, the next start is at the
        end of the loop at once. Leaving the loop early, by ``break`` or an exception, keeps the
        state for a resume, which does the batch again that the loop was left in. At SIGTERM the
        step is finished and the process exits with 75, unless the program handles that signal
        itself.

        Raises:
            ModelChangedError: The snapshot belongs to another model.
            NothingToResumeError: See ``run.resume``.
        """
        data = self._data = LoaderPosition(loader, seed_samples=self._config.run.seed_samples)
        self._epoch, self._commits, self._stepped = 0, 0, None
        end = End.INTERRUPTED
        try:
            keeper, rng = self._open(loader, data)
            if self._epoch >= epochs and rng is not None:
                report.say(
                    f"nothing to do: the run is in epoch {self._epoch + 1} and epochs={epochs} "
                    "was asked for; its state is kept"
                )
                return
            with on_sigterm(keeper.request_stop):
                for epoch in range(self._epoch, epochs):
                    self._epoch = epoch
                    for batch in data.one_pass(epoch, rng):
                        yield batch
                        self._commit()
                    rng = None
            end = End.FINISHED
        finally:
            self._close(end)

    def step(
        self,
        loss: torch.Tensor | None = None,
        *,
        closure: Callable[[], Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Update the parameters: optimizer, scheduler, then gradients to None.

        Args:
            loss: This step's loss, if it should be watched: no snapshot is taken of a step whose
                loss is not finite.
            closure: Computes loss and gradients anew, for optimizers that ask for it (LBFGS). What
                it returned first is watched where no ``loss`` is given.
            scaler: Steps the optimizer and updates its scale. Where it finds the gradients too
                large and skips the update, the scheduler is not stepped and the loss not watched.
                Name it in ``objects``, so that its scale is kept.
        """
        if self._keeper is not None:
            self._keeper.pass_update()
        skipped = False
        if scaler is None:
            found = self._optimizer.step(closure) if closure else self._optimizer.step()
            loss = found if loss is None and isinstance(found, torch.Tensor) else loss
        else:
            before = scaler.get_scale()
            scaler.step(self._optimizer)
            scaler.update()
            skipped = scaler.get_scale() < before
        if self._scheduler is not None and not skipped:
            self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        self._stepped = (None if loss is None or skipped else loss.detach(),)
        if self._keeper is not None:
            self._keeper.stepped(self._step)

    @property
    def keeper(self) -> Keeper | None:
        """The engine room, while `batches` runs."""
        return self._keeper

    # ------------------------------------------------------------------------------------------

    def _open(
        self, loader: Iterable[Any], data: LoaderPosition
    ) -> tuple[Keeper, dict[str, Any] | None]:
        """Restore, or begin anew; and the state of the random generators to go on with, if any."""
        replicas = isinstance(self._model, torch.nn.parallel.DistributedDataParallel)
        device = next((p.device for p in self._model.parameters()), None)
        place = current_place(self._config, replicas=replicas, device=device)
        keeper = Keeper(self._config, shared_identity(self._config), place, next_fit())
        self._unsaved = Unsaved(self._model)
        try:
            restored = keeper.find()
            if restored is None:
                keeper.forget()
            else:
                keeper.accept(
                    restored,
                    self._model.state_dict(),
                    [f"model.{p}." for p in MODULE_PARTS],
                    flexible_names(self._model),
                )
            keeper.begin(
                {
                    "model": structure_fingerprint(self._model),
                    "optimizer": optimizer_fingerprint([self._optimizer]),
                    "scheduler": scheduler_fingerprint(filter(None, [self._scheduler])),
                    **group_fingerprints([self._optimizer]),
                    "data": data_fingerprint([loader]),
                    "script": script_fingerprint(),
                },
                Replicas(self._replicated, self._model),
            )
            if restored is None:
                data.prepare(None, keeper.degraded)
                self._attributes.begin(list(self._model.named_modules()))
                keeper.announce(None)
                keeper.reserve(self._expected_size())
            else:
                self._load_model(restored, keeper.identity.run_id)
                self._load(restored.state)
                data.prepare(restored.state["position"]["data"], keeper.degraded)
                notes = (
                    data.note,
                    first_sum_differs(self._model, place.world_size),
                    self._attributes.begin(
                        list(self._model.named_modules()), restored.state["attributes"]
                    ),
                )
                note = "; ".join(filter(None, notes))
                keeper.announce(restored, exact=not note, note=note)
        except BaseException:
            keeper.close(End.INTERRUPTED)
            raise
        self._keeper = keeper
        return keeper, None if restored is None else restored.rng

    def _commit(self) -> None:
        """The body of the loop is through: the step that it made, if any, is done."""
        stepped, self._stepped = self._stepped, None
        keeper, data = self._keeper, self._data
        if stepped is None or keeper is None or data is None:
            return
        self._commits += 1
        position = Position(2 * self._commits, self._step, self._epoch, data.batch, time.time())
        keeper.boundary(
            position, self._state, volatile=self._volatile, watch=("model",), loss=stepped[0]
        )
        if keeper.stopping:
            leave(keeper, self._step)

    def _state(self) -> dict[str, Any]:
        modules = self._tree.modules()
        state: dict[str, Any] = {
            "model": module_state(self._model),
            "unsaved": self._unsaved.state(modules),
            "wrapper": wrapper_state(self._model),
            "attributes": self._attributes.look(modules),
            "optimizer": optimizer_state(self._optimizer),
            "objects": {name: thing.state_dict() for name, thing in self._objects.items()},
            "position": {
                "step": self._step,
                "epoch": self._epoch,
                "commits": self._commits,
                "data": self._data.state() if self._data is not None else None,
            },
        }
        if self._scheduler is not None:
            state["scheduler"] = self._scheduler.state_dict()
        return state

    def _load_model(self, restored: Restored, run_id: str) -> None:
        try:
            self._model.load_state_dict(join_module_state(restored.state["model"]))
        except RuntimeError as error:
            raise does_not_load(restored.step, run_id, error) from error

    def _load(self, state: dict[str, Any]) -> None:
        self._unsaved.restore(state["unsaved"])
        restore_wrapper(self._model, state["wrapper"])
        try:
            restore_optimizer(self._optimizer, state["optimizer"])
        except (KeyError, ValueError, TypeError) as error:
            raise ModelChangedError(
                f"the snapshot's optimizer state does not fit {type(self._optimizer).__name__} "
                f"({error!r}): use the optimizer that the run was begun with (groups that were "
                "added later: before batches()), another run.id, or run.resume=never to give the "
                "old state up"
            ) from error
        if self._scheduler is not None and "scheduler" in state:
            self._scheduler.load_state_dict(state["scheduler"])
        for name, thing in self._objects.items():
            if name in state["objects"]:
                thing.load_state_dict(state["objects"][name])
        position = state["position"]
        self._step, self._epoch = position["step"], position["epoch"]
        self._commits = position["commits"]

    def _volatile(self) -> set[int]:
        return {b.data_ptr() for b in self._model.buffers() if b.layout is torch.strided}

    def _replicated(self) -> Iterator[torch.Tensor]:
        yield from self._model.parameters()
        yield from tensors_of([self._optimizer])

    def _expected_size(self) -> int:
        return expected_size(self._model, [self._optimizer])

    def _close(self, end: End) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        if end is End.INTERRUPTED:
            announce.note_interrupted(
                keeper.journal,
                run=keeper.identity.run_id,
                fit=keeper.fit,
                rank=keeper.place.rank,
                step=self._step,
            )
        keeper.close(end)


def expected_size(model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of model and optimizer state, the latter guessed where it does not exist yet.

    What is still lazy has no size yet: it counts as none.
    """
    size = sum(
        t.numel() * t.element_size()
        for t in model.state_dict().values()
        if torch.is_tensor(t) and not is_lazy(t)
    )
    for optimizer in optimizers:
        known = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        if known:
            size += sum(t.numel() * t.element_size() for t in known)
            continue
        moments = _moments(optimizer)
        size += sum(
            moments * p.numel() * p.element_size()
            for g in optimizer.param_groups
            for p in g["params"]
            if p.requires_grad and not is_lazy(p)
        )
    return size


def _moments(optimizer: torch.optim.Optimizer) -> int:
    """Tensors of a parameter's size that the optimizer will keep for each parameter."""
    defaults = optimizer.defaults
    if "betas" in defaults:
        return 3 if defaults.get("amsgrad") else 2
    return 1 if defaults.get("momentum") or not isinstance(optimizer, torch.optim.SGD) else 0
