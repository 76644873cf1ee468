"""HyperConnection: one site, that is, the streams around one sublayer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from birkhoff._checks import as_count
from birkhoff._registry import Resolution
from mhc_layers import functional
from mhc_layers._registry import SiteFacts, explain, resolve
from mhc_layers._sites import SiteImplementation, SiteState
from mhc_layers.config import CONNECTION_KINDS
from mhc_layers.conventions import PAPER, Convention, get_convention
from mhc_layers.initialization import Init, get_init
from mhc_layers.precision import KeepsFloat32
from mhc_layers.residual_maps import get_res_map

if TYPE_CHECKING:
    from mhc_layers.capture import CapturedCoefficients

__all__ = ["HyperConnection"]


class HyperConnection(KeepsFloat32):
    """Wraps a sublayer with n residual streams that persist from site to site.

    Parameters
    ----------
    dim : int
        Channels C of one stream.
    num_streams : int
        Number of streams n, at least 1.
    sublayer : callable, optional
        Module or function from ``(..., C)`` to ``(..., C)``, or to a tuple whose first entry is that. Its input should
        be normalised, as in every pre-norm network: by a norm that it starts with, or better by ``norm``.
    norm : Module or str, optional
        The norm of the sublayer's input, which the site applies with its read; the sublayer must not apply it again.
        A module from ``(..., C)`` to ``(..., C)`` becomes the site's submodule ``norm``; a string names a submodule
        that the sublayer already holds, so that parameters keep their names. The fused kernels read and normalise in
        one pass if it is a :class:`torch.nn.RMSNorm` or an :class:`mhc_layers.models.norm.RMSNorm` with a gain,
        without hooks and with its class's ``forward`` (which is then not called); any other module is called.
    convention : Convention or str
        Orientation, order and epsilons of the maps; a preset or its name.
    connection : str
        "mhc": the paper's layer. "mhc_static": the same with biases only. "identity": ``h_res = I``. "hc" and
        "hc_static": dynamic and static Hyper-Connections, whose maps are free. "residual": see ``disable``.
    res_map : str or object, optional
        Replaces the projection of the residual logits ("mhc" and "mhc_static" only): a parametrization or a solver of
        birkhoff, or its class name, see :func:`mhc_layers.residual_maps.get_res_map`.
    init : Init or str
        Initial values, a preset or its name (:mod:`mhc_layers.initialization`). The Hyper-Connections kinds have
        their own published start and ignore it.
    index : int
        Position of the site in depth; the initial values favour stream ``index % n``.
    disable : bool
        A plain residual at the same call site: reads stream 0, adds the output to every stream, owns no parameters.
    implementation : str or SiteImplementation
        "auto" takes the first row of the table that accepts this site; the name of a row insists on it, and using the
        site where that row cannot run raises the reason. The choice is made anew when the site moves to a device.
    device, dtype
        Of the site's own parameters; dtype float32 or float64. A later ``.bfloat16()`` leaves them as they are, and
        casts sublayer and norm.

    Attributes
    ----------
    phi, bias, alpha_pre, alpha_post, alpha_res : Parameter or None
        ``phi ((n + 2) n, n C)`` with rows pre, post, res, ``bias ((n + 2) n)``, 0-d gates. "identity" has no rows res,
        dynamic Hyper-Connections have ``phi (n + 2, C)``, static kinds no ``phi`` and gates, "residual" has nothing.
    sublayer : callable or None
        As given.
    norm : Module or None
        The norm, if it was given as a module; :attr:`input_norm` is the norm wherever it lives.

    Raises
    ------
    ValueError
        For sizes below 1, an unknown kind, convention, init or row, or a norm that the sublayer does not have.
    TypeError
        If the sublayer cannot be called, or ``norm`` is of another kind.

    Notes
    -----
    Claims: :ref:`maps_follow_the_equations <claim-maps-follow-the-equations>`,
    :ref:`step_follows_the_equation <claim-step-follows-the-equation>`,
    :ref:`exact_side_of_the_operator <claim-exact-side-of-the-operator>`,
    :ref:`layer_gradient <claim-layer-gradient>`,
    :ref:`v4_without_eps_is_the_paper_transposed <claim-v4-without-eps-is-the-paper-transposed>`.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers import HyperConnection, collapse_streams, expand_streams
    >>> site = HyperConnection(dim=8, num_streams=4, sublayer=torch.nn.Linear(8, 8))
    >>> x = expand_streams(torch.randn(2, 5, 8), 4)
    >>> collapse_streams(site(x)).shape
    torch.Size([2, 5, 8])
    """

    phi: nn.Parameter
    bias: nn.Parameter
    alpha_pre: nn.Parameter
    alpha_post: nn.Parameter
    alpha_res: nn.Parameter

    def __init__(
        self,
        dim: int,
        num_streams: int = 4,
        sublayer: Callable[..., Any] | None = None,
        *,
        norm: nn.Module | str | None = None,
        convention: Convention | str = PAPER,
        connection: str = "mhc",
        res_map: Any | None = None,
        init: Init | str = "prenorm",
        index: int = 0,
        disable: bool = False,
        implementation: str | SiteImplementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dim = as_count(dim, "dim", least=1)
        self.num_streams = as_count(num_streams, "num_streams", least=1)
        if connection not in CONNECTION_KINDS:
            raise ValueError(f"Unknown connection {connection!r}; accepted: {', '.join(CONNECTION_KINDS)}.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Parameters of a site are float32 or float64, got {dtype}; the streams may be narrower.")
        if res_map is not None and connection not in ("mhc", "mhc_static"):
            raise ValueError(f"res_map replaces the projection of 'mhc' and 'mhc_static', got {connection!r}.")
        if sublayer is not None and not callable(sublayer):
            raise TypeError(
                f"sublayer is a {type(sublayer).__name__}, which cannot be called; give a module or a function from "
                f"(..., {dim}) to (..., {dim}), or None to call pre() and post() yourself."
            )
        self.sublayer = sublayer
        self._norm_name = norm if isinstance(norm, str) else None
        self.norm = None if isinstance(norm, str) else norm
        _check_norm(self, norm)
        self.convention = get_convention(convention)
        self.connection = "residual" if disable else connection
        self.res_map = get_res_map(res_map)
        self.init = get_init(init)
        self.index = index
        self.requested_implementation = implementation
        self._capture: CapturedCoefficients | None = None
        self._make_parameters(device, dtype)
        self.reset_parameters()
        self._implementation = resolve(self, implementation)

    def _make_parameters(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        n, c = self.num_streams, self.dim
        num_res = n * n if self.res_map is None else self.res_map.num_parameters(n)
        phi_shape, bias_size, gates = {
            "mhc": ((2 * n + num_res, n * c), 2 * n + num_res, ("pre", "post", "res")),
            "mhc_static": (None, 2 * n + num_res, ()),
            "identity": ((2 * n, n * c), 2 * n, ("pre", "post")),
            "hc": ((n + 2, c), (n + 2) * n, ("pre", "post", "res")),
            "hc_static": (None, (n + 2) * n, ()),
            "residual": (None, None, ()),
        }[self.connection]

        def register(name: str, shape: tuple[int, ...] | None) -> None:
            value = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, value)

        register("phi", phi_shape)
        register("bias", None if bias_size is None else (bias_size,))
        for gate in ("pre", "post", "res"):
            register(f"alpha_{gate}", () if gate in gates else None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values: the preset's, or the published ones of Hyper-Connections."""
        if self.bias is None:
            return
        n, init = self.num_streams, self.init
        if self.connection in ("hc", "hc_static"):
            phi_std, alpha = 0.0, 0.01
            pre = [float(stream == self.index % n) for stream in range(n)]
            post = [1.0] * n
            res = np.eye(n).ravel()
        else:
            phi_std, alpha = init.phi_std, init.alpha
            pre = init.pre_bias(n, self.index, self.convention.eps_pre)
            post = init.post_bias(n, self.index)
            if self.res_map is not None:
                res = self.res_map.initial_parameters(n, mass=init.off_diagonal_mass(n))
            else:
                res = init.off_diagonal * (1.0 - np.eye(n)).ravel()
        values: list[Any] = [pre, post] if self.connection == "identity" else [pre, post, res]
        self.bias.copy_(torch.from_numpy(np.concatenate(values)))
        if self.phi is not None:
            nn.init.normal_(self.phi, std=phi_std) if phi_std else nn.init.zeros_(self.phi)
        for gate in (self.alpha_pre, self.alpha_post, self.alpha_res):
            if gate is not None:
                gate.fill_(alpha)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HyperConnection:
        super()._apply(fn, recurse)
        self._implementation = resolve(self, self.requested_implementation)  # the device may have changed
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After a copy or an unpickling: choose the implementation again, so that sites go on sharing one object."""
        super().__setstate__(state)
        self._capture = None
        self._implementation = resolve(self, self.requested_implementation)

    def _keeps_orientation(self) -> bool:
        """Whether the parameters mean another operator under a convention that stores them transposed."""
        return self.connection in ("mhc", "mhc_static") and self.res_map is None and self.num_streams > 1

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As usual; the metadata that travels with a state dict says which convention the values belong to."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata") and self._keeps_orientation():
            note = {"convention": self.convention.name, "transposed": self.convention.transposed}
            destination._metadata[prefix[:-1]].update(note)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """As usual; values stored for the transposed operator are an error, as their shapes would not tell."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        transposed = self.convention.transposed
        if self._keeps_orientation() and local_metadata.get("transposed", transposed) != transposed:
            error_msgs: list[str] = rest[-1]
            error_msgs.append(
                f"{prefix}phi and {prefix}bias were saved by a site of the convention "
                f"{local_metadata['convention']!r} and this one has {self.convention.name!r}, which stores the "
                "residual rows transposed; mhc_layers.hub.load_site(site, mhc_layers.hub.site_tensors(other)) converts."
            )

    @property
    def input_norm(self) -> nn.Module | None:
        """The norm that the site applies to what it reads, wherever it lives, or None.

        None also where the sublayer was replaced by one without a submodule of this name; it then sees what was read.
        """
        if self._norm_name is None:
            return self.norm
        module: Any = self.sublayer
        for name in self._norm_name.split("."):
            module = getattr(module, name, None)
        return module

    def normed(self, u: Tensor) -> Tensor:
        """Apply :attr:`input_norm`, if there is one, to ``u (..., C)`` as it was read; the dtype stays."""
        norm = self.input_norm
        return u if norm is None else norm(u).to(u.dtype)

    @property
    def implementation(self) -> SiteImplementation:
        """The object that runs this site, chosen once from the table."""
        return self._implementation

    def explain(self) -> Resolution[SiteFacts]:
        """Say which row of the table of implementations serves this site, and why the rows before it refused."""
        return explain(self)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits before any map: those of both gates ``(..., 2 n)`` and the residual ones ``(..., k)``.

        For "mhc" and "identity" (k = 0) they depend on the streams ``x (..., n, C)``; "mhc_static" returns its biases,
        expanded.

        Raises
        ------
        ValueError
            For the other kinds, whose maps are free.
        """
        if self.connection not in ("mhc", "mhc_static", "identity"):
            raise ValueError(
                f"A site of kind {self.connection!r} has no logits; its maps are free. Accepted: 'mhc', 'mhc_static', "
                "'identity'; coefficients(x) gives the maps of every kind."
            )
        if self.phi is None:
            gate, residual = self.bias.clone().tensor_split([2 * self.num_streams])
            return gate.expand(*x.shape[:-2], -1), residual.expand(*x.shape[:-2], -1)
        return functional.site_logits(x, self, self.convention)

    def threaded_maps(self, x: Tensor) -> Maps:
        """Return the three maps of streams ``(..., n, C)``, ``h_res`` None for I, and the streams to go on with."""
        return _MAPS[self.connection](self, x)

    def residual(self, logits: Tensor) -> Tensor:
        """Map residual logits ``(..., k)`` to the operator ``(..., n, n)``, by the convention or by ``res_map``."""
        if self.res_map is not None:
            return self.res_map.matrix(logits, self.num_streams)
        n = self.num_streams
        return functional.project_residual(logits.unflatten(-1, (n, n)), self.convention)

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the three maps of this site.

        Parameters
        ----------
        x : Tensor
            Streams ``(..., n, C)``.

        Returns
        -------
        h_pre, h_post : Tensor
            ``(..., n)``.
        h_res : Tensor
            ``(..., n, n)``, the operator that acts from the left, output stream first.

        Raises
        ------
        ValueError
            If ``x`` does not end in ``(n, C)``.

        Examples
        --------
        >>> import torch
        >>> from mhc_layers import HyperConnection
        >>> site = HyperConnection(dim=8, num_streams=4)
        >>> h_pre, h_post, h_res = site.coefficients(torch.randn(2, 4, 8))
        >>> torch.allclose(h_res.sum(-1), torch.ones(2, 4))
        True
        """
        self._check(x, self.num_streams)
        h_pre, h_post, h_res, _ = self.threaded_maps(x)
        if h_res is None:
            eye = torch.eye(self.num_streams, dtype=h_pre.dtype, device=h_pre.device)
            h_res = eye.expand(*x.shape[:-2], -1, -1)
        return h_pre, h_post, h_res

    def _check(self, x: Tensor, num_streams: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"Streams must be a tensor (..., {num_streams}, {self.dim}), got {type(x).__name__}.")
        if x.dim() < 2 or x.shape[-2] != num_streams or x.shape[-1] != self.dim:
            raise ValueError(
                f"Streams must end in (num_streams, dim) = ({num_streams}, {self.dim}), got shape "
                f"{tuple(x.shape)}; make them once with expand_streams(e, {self.num_streams})."
                if num_streams == self.num_streams
                else f"With broadcast=True one stream (..., 1, {self.dim}) stands for all, got shape {tuple(x.shape)}."
            )
        if not x.is_floating_point():
            raise TypeError(f"Streams must have a floating dtype, got {x.dtype}.")

    def pre(self, x: Tensor, previous: Tensor | None = None, *, broadcast: bool = False) -> tuple[Tensor, SiteState]:
        """Read the sublayer's input from the streams.

        Parameters
        ----------
        x : Tensor
            Streams ``(..., n, C)``.
        previous : Tensor, optional
            ``h_pre (..., n)`` of the site before, where ``convention.read_delay`` is 1; without it this is the first
            site, which reads stream 0.
        broadcast : bool
            ``x (..., 1, C)`` stands for n equal streams, as they are after the embedding. The fused kernels read it
            once instead of n times, and :meth:`post` takes it as it is.

        Returns
        -------
        u : Tensor
            ``(..., C)``, after :attr:`input_norm`, in the dtype of the streams.
        state : SiteState
            For :meth:`post` or :meth:`boundary`.

        Raises
        ------
        ValueError
            If ``x`` does not end in ``(n, C)``, or in ``(1, C)`` with ``broadcast``.
        TypeError
            If ``x`` is not floating.

        Examples
        --------
        >>> import torch
        >>> from mhc_layers import HyperConnection
        >>> first, second = HyperConnection(8, 4), HyperConnection(8, 4, index=1)
        >>> e = torch.randn(2, 1, 8)
        >>> u, state = first.pre(e, broadcast=True)
        >>> x, u, state = first.boundary(e, torch.tanh(u), state, second)
        >>> second.post(x, torch.tanh(u), state).shape
        torch.Size([2, 4, 8])
        """
        if broadcast:
            self._check(x, 1)
            x = self._whole(x)
        else:
            self._check(x, self.num_streams)
        u, state = self._implementation.pre(x, self, previous)
        if self._capture is not None:
            self._capture.keep(self, x.expand(*x.shape[:-2], self.num_streams, -1), state)
        return u, state

    def _whole(self, x: Tensor) -> Tensor:
        """Copy one stream that stands for n equal ones, unless the implementation takes it as it is."""
        if x.shape[-2] == self.num_streams or getattr(self._implementation, "folds_broadcast", False):
            return x
        return functional.expand_streams(x.squeeze(-2), self.num_streams)

    def post(self, x: Tensor, f: Tensor, state: SiteState) -> Tensor:
        """Write the sublayer's output to the streams.

        Parameters
        ----------
        x : Tensor
            What :meth:`pre` or :meth:`boundary` read.
        f : Tensor
            The sublayer's output ``(..., C)``; converted to the dtype of the streams.
        state : SiteState
            From the same read.

        Returns
        -------
        Tensor
            The next streams ``(..., n, C)``.

        Raises
        ------
        ValueError, TypeError
            If ``f`` is not a floating tensor with the shape of the sublayer's input.
        """
        self._check_output(f, x)
        return self._implementation.post(self._whole(x), f, state)

    def boundary(
        self, x: Tensor, f: Tensor, state: SiteState, next_site: HyperConnection
    ) -> tuple[Tensor, Tensor, SiteState]:
        """:meth:`post` of this site, then :meth:`pre` of ``next_site``; fused where both run the same row.

        Takes what :meth:`post` takes and raises what it raises; returns the next streams ``(..., n, C)``, and what
        :meth:`pre` of the next site returns.
        """
        self._check_output(f, x)
        x = self._whole(x)
        if next_site._implementation is self._implementation:
            x, u, state = self._implementation.boundary(x, f, state, next_site)
        else:
            x = self._implementation.post(x, f, state)
            u, state = next_site._implementation.pre(x, next_site, state.h_pre)
        if next_site._capture is not None:
            next_site._capture.keep(next_site, x, state)
        return x, u, state

    def forward(self, x: Tensor, *args: Any, previous: SiteState | None = None, **kwargs: Any) -> Any:
        """Apply the site to streams.

        Parameters
        ----------
        x : Tensor
            Streams ``(..., n, C)``.
        *args, **kwargs
            Passed on to the sublayer after its input.
        previous : SiteState, optional
            State of the site before, where ``convention.read_delay`` is 1. See :meth:`pre` to obtain states.

        Returns
        -------
        Tensor or tuple
            The next streams; if the sublayer returned a tuple, ``(streams, *the rest)``.

        Raises
        ------
        ValueError
            If ``x`` does not end in ``(n, C)``, there is no sublayer, or its output has another shape than its input.
        TypeError
            If ``x`` is not floating, or the sublayer returned neither a tensor nor a tuple that starts with one.
        """
        if self.sublayer is None:
            raise ValueError("This site has no sublayer; give one to HyperConnection, or call pre() and post().")
        u, state = self.pre(x, None if previous is None else previous.h_pre)
        result = self.sublayer(u, *args, **kwargs)
        if isinstance(result, tuple) and result:
            return self.post(x, result[0], state), *result[1:]
        return self.post(x, result, state)

    def _check_output(self, f: Any, x: Tensor) -> None:
        """Refuse what a sublayer must not return; the cost is one comparison of shapes."""
        if not isinstance(f, Tensor):
            got = "an empty tuple" if f == () else type(f).__name__
            raise TypeError(
                f"The sublayer's output must be a tensor of shape (..., {self.dim}), or a tuple that starts with one "
                f"and whose rest is passed on; got {got}. Wrap the sublayer in a function that returns that."
            )
        expected = (*x.shape[:-2], x.shape[-1])
        if f.shape != expected:
            raise ValueError(
                f"The sublayer's output must have the shape of its input, {tuple(expected)} for streams of shape "
                f"{tuple(x.shape)}; got {tuple(f.shape)}. A sublayer of another width needs a projection back to "
                f"dim = {self.dim}."
            )
        if not f.is_floating_point():
            raise TypeError(f"The sublayer's output must have a floating dtype, got {f.dtype}.")

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_streams={self.num_streams}, connection={self.connection!r}, "
            f"convention={self.convention.name!r}"
        )


def _check_norm(site: HyperConnection, norm: Any) -> None:
    """Refuse a norm that the site could not apply."""
    if norm is None:
        return
    if isinstance(norm, str):
        held = dict(site.sublayer.named_modules()) if isinstance(site.sublayer, nn.Module) else {}
        if not norm or norm not in held:
            names = ", ".join(repr(name) for name in held if name) or "none"
            raise ValueError(
                f"norm is {norm!r}, which is not a submodule of the sublayer; it has: {names}. Give one of these "
                "names, or the norm itself as a module."
            )
        norm = held[norm]
    elif not isinstance(norm, nn.Module):
        raise TypeError(f"norm must be a module, the name of a submodule of the sublayer, or None; got {norm!r}.")
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.shape != (site.dim,):
        raise ValueError(
            f"norm has a gain of shape {tuple(weight.shape)}; it normalises what the site reads, so this must be "
            f"({site.dim},)."
        )


Maps = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""``h_pre``, ``h_post``, ``h_res`` (None: the identity), and the streams to use from here on."""


def _constrained_maps(site: HyperConnection, x: Tensor) -> Maps:
    gate, residual, x = functional.threaded_logits(x, site, site.convention)
    with functional.without_autocast(x.device.type):
        return *functional.gate_maps(gate, site.convention), site.residual(residual), x


def _static_constrained_maps(site: HyperConnection, x: Tensor) -> Maps:
    with functional.without_autocast(x.device.type):
        gate, residual = site.bias.tensor_split([2 * site.num_streams])
        pre, post = functional.gate_maps(gate, site.convention)
        return _expanded(pre, post, site.residual(residual), x)


def _identity_maps(site: HyperConnection, x: Tensor) -> Maps:
    gate, _, x = functional.threaded_logits(x, site, site.convention)
    return *functional.gate_maps(gate, site.convention), None, x


def _dynamic_hc_maps(site: HyperConnection, x: Tensor) -> Maps:
    return *functional.hc_coefficients(x, site, site.convention), x


def _static_hc_maps(site: HyperConnection, x: Tensor) -> Maps:
    n = site.num_streams
    pre, post, res = site.bias.clone().split([n, n, n * n])  # a copy: what is captured must not change with the bias
    return _expanded(pre, post, res.view(n, n), x)


def _residual_maps(site: HyperConnection, x: Tensor) -> Maps:
    one_hot = torch.zeros(site.num_streams, dtype=functional.compute_dtype(x.dtype), device=x.device)
    one_hot[0] = 1.0
    tokens = x.shape[:-2]
    return one_hot.expand(*tokens, -1), torch.ones_like(one_hot).expand(*tokens, -1), None, x


def _expanded(pre: Tensor, post: Tensor, res: Tensor, x: Tensor) -> Maps:
    """The same maps for every token of the streams."""
    tokens = x.shape[:-2]
    return pre.expand(*tokens, -1), post.expand(*tokens, -1), res.expand(*tokens, -1, -1), x


_MAPS: dict[str, Callable[[HyperConnection, Tensor], Maps]] = {
    "mhc": _constrained_maps,
    "mhc_static": _static_constrained_maps,
    "identity": _identity_maps,
    "hc": _dynamic_hc_maps,
    "hc_static": _static_hc_maps,
    "residual": _residual_maps,
}
