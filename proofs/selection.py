"""What a run is about, as plain data, so that another process can build the same subjects from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proofs import subjects, systems
from proofs.backends import installed_backends

__all__ = ["Selection"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The subjects of a run: somebody's projection, or this library on some backends.

    Parameters
    ----------
    projection : str, optional
        ``"package.module:function"``; without it this library is verified.
    last : {"rows", "columns"}
        The side that `projection` normalises last.
    num_iters : int, optional
        Compare `projection` with that many exact iterations as well.
    dtypes : tuple of str, optional
        Narrows what `projection` is tried on.
    sizes : tuple of int, optional
        The n that `projection` takes.
    backends : tuple of str
        Names of backends; none: NumPy for a projection, every one that runs here for this library.
    solvers : tuple of str, optional
        Only these of ``birkhoff.solvers``, and nothing but solvers.
    """

    projection: str | None = None
    last: str = "rows"
    num_iters: int | None = None
    dtypes: tuple[str, ...] | None = None
    sizes: tuple[int, ...] | None = None
    backends: tuple[str, ...] = ()
    solvers: tuple[str, ...] | None = None

    def subjects(self) -> list[Any]:
        """Build them; ``ValueError`` says what is wrong with the selection."""
        if self.projection is not None:
            function = subjects.load_function(self.projection)
            return [
                subjects.user_subject(
                    function,
                    name=self.projection,
                    last=self.last,
                    backend_name=name,
                    num_iters=self.num_iters,
                    dtypes=self.dtypes,
                    sizes=self.sizes,
                )
                for name in dict.fromkeys(self.backends or ("numpy",))
            ]
        names = list(dict.fromkeys(self.backends or installed_backends()))
        found: list[Any] = list(subjects.builtin_subjects(names, self.solvers))
        if self.solvers is None:
            found.extend(systems.builtin_systems(names))
        return found
