"""The networks that a pipeline needs beside its reference model: trained ones that teach, untrained ones that learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import tf_keras

from compress.data.source import Data
from compress.errors import CompressError
from compress.graph.rewrite import copy_model
from compress.models.source import ModelSource
from compress.strategies.distillation.judging import require_same_classes, require_same_values


@dataclass(frozen=True)
class Networks:
    """``teachers``: by the names in ``recovery.teachers``; ``students``: by those that strategies build.

    ``keys``: of teachers that one stage alone names, the configuration key that does.
    """

    teachers: Mapping[str, ModelSource] = field(default_factory=dict)
    students: Mapping[str, ModelSource] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    def of(self, teachers: Collection[str], students: Collection[str]) -> list[ModelSource]:
        """Return the sources of these names; ``reference`` and the like have none."""
        named = ((self.teachers, teachers), (self.students, students))
        return [sources[name] for sources, names in named for name in names if name in sources]

    def teacher(
        self, name: str, reference: tf_keras.Model, data: Data, trained: Callable[[ModelSource], tf_keras.Model]
    ) -> tf_keras.Model:
        """Return the trained teacher; ``trained``: returns the model of a source with its weights.

        Raises:
            CompressError: if it does not fit the data, or reads other values than the reference model.
        """
        where = self._teacher_key(name)
        with said_of(where):
            model = trained(self.teachers[name])
        require_same_classes(model, name, reference, where, "teacher")
        require_same_values(model, name, reference, data, where)
        return model

    def student(
        self, name: str, reference: tf_keras.Model, data: Data, seed: int, where: str = "student"
    ) -> tf_keras.Model:
        """Return the untrained network, of as many classes as the reference model has.

        ``where``: who wants it, for errors.

        Raises:
            CompressError: if it does not fit the data.
        """
        tf_keras.backend.reset_uids()
        classes = int(reference.output_shape[-1] or data.classes)
        other = "Name another network, or give this one other fields: in a file of your own, model/<name>.yaml, with "
        with said_of(where, other + "--config-dir."):
            return copy_model(self.students[name].build(dataclasses.replace(data, classes=classes), seed))

    def refuse_misfits(self, reference: tf_keras.Model, data: Data, seed: int, users: Callable[[str], str]) -> None:
        """Build every network once, and refuse those that do not fit; nothing is trained.

        ``users``: the configuration key that names a student, for the error.

        Raises:
            CompressError: naming both networks.
        """
        data = data.fitted_to(reference, f"model {reference.name}")
        for name in self.students:
            model = self.student(name, reference, data, seed, users(name))
            require_same_classes(model, name, reference, users(name), "student")
        for name, source in self.teachers.items():
            where = self._teacher_key(name)
            with said_of(where):
                model = copy_model(source.build(data, seed))
            require_same_classes(model, name, reference, where, "teacher")
            if source.origin().schedule is None:
                require_same_values(model, name, reference, data, where)

    def _teacher_key(self, name: str) -> str:
        return f"{self.keys.get(name, 'recovery.teachers')}, {name}"


@contextmanager
def said_of(name: str, fix: str | None = None) -> Iterator[None]:
    """Have errors say which network they are about; ``fix``: what to do in place of setting the model's own keys."""
    try:
        yield
    except CompressError as error:
        where = name if error.where == "model" else f"{name}: {error.where}"
        raise CompressError(where, expected=error.expected, received=error.received, fix=fix or error.fix) from error
