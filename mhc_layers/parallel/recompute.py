r"""Recomputation: drop what the connections can rebuild cheaply, keep what only the sublayers can make.

The streams are n times as wide as the model, so keeping them for the backward pass at every site is what makes
hyper-connections expensive in memory. A *recompute block* keeps the streams that enter it and the output f of every
sublayer in it; in the backward pass the block's streams, coefficients and sublayer inputs are rebuilt from these
without running a sublayer again (mHC paper, section 4.3.2). For L layers in blocks of :math:`L_r`, in elements per
token,

.. math:: L_r^* = \arg\min_{L_r} \; n C \lceil L / L_r \rceil + (n + 2) C L_r .
   :label: recompute-argmin

The minimum is taken over integers; rounding :math:`\sqrt{n L / (n + 2)}` misses it for some L.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mhc_layers._recompute import StreamRebuilder
from mhc_layers.hyper_connection import HyperConnection
from mhc_layers.models.transformer import StepContext, Transformer, WalkState

__all__ = [
    "RecomputedWalk",
    "SelectiveWalk",
    "apply_recompute",
    "block_boundaries",
    "block_size",
    "connection_policy",
    "recompute_elements",
]

_ATEN = torch.ops.aten
_KEPT = frozenset(
    {
        _ATEN.mm.default,
        _ATEN.addmm.default,
        _ATEN._scaled_mm.default,
        _ATEN._grouped_mm.default,
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default,
    }
)


def recompute_elements(num_layers: int, block: int, *, num_streams: int, dim: int = 1) -> int:
    """Count the elements per token that a block size keeps or rebuilds at once.

    Parameters
    ----------
    num_layers : int
        Layers L (sites) that are cut into blocks.
    block : int
        Layers of a block.
    num_streams : int
        Streams n.
    dim : int
        Channels C.

    Returns
    -------
    int
        ``n C ceil(L / block) + (n + 2) C block``, the objective of the paper's Eq. 20.

    Raises
    ------
    ValueError
        If ``block`` is smaller than 1.

    Examples
    --------
    >>> from mhc_layers.parallel.recompute import recompute_elements
    >>> recompute_elements(60, 6, num_streams=4)
    76
    """
    _check_block(block)
    return num_streams * dim * -(-num_layers // block) + (num_streams + 2) * dim * block


def _check_block(block: int) -> None:
    if block < 1:
        raise ValueError(f"block is {block}; a recompute block has 1 site or more, None takes the best size")


def block_size(num_layers: int, *, num_streams: int) -> int:
    """Return the number of layers in a block that keeps the least memory.

    Parameters
    ----------
    num_layers : int
        Layers L of one pipeline stage.
    num_streams : int
        Streams n.

    Returns
    -------
    int
        The smallest minimiser of :func:`recompute_elements` over 1 .. L.

    Raises
    ------
    ValueError
        If a number is smaller than 1.

    Examples
    --------
    >>> from mhc_layers.parallel.recompute import block_size
    >>> [block_size(layers, num_streams=4) for layers in (60, 36, 30, 24, 12)]
    [6, 4, 5, 4, 3]
    """
    if num_layers < 1 or num_streams < 1:
        raise ValueError(f"num_layers is {num_layers}, num_streams {num_streams}; both must be 1 or more")
    return min(
        range(1, num_layers + 1), key=lambda block: recompute_elements(num_layers, block, num_streams=num_streams)
    )


def block_boundaries(stages: Sequence[int], *, num_streams: int, block: int | None = None) -> list[tuple[int, int]]:
    """Cut the layers of every pipeline stage into recompute blocks; no block straddles a stage border.

    Parameters
    ----------
    stages : sequence of int
        Layers of each stage, in depth order.
    num_streams : int
        Streams n.
    block : int, optional
        Layers of a block; the best size of each stage by default.

    Returns
    -------
    list of (int, int)
        First and one-past-last layer of each block.

    Raises
    ------
    ValueError
        If ``block`` is smaller than 1.

    Examples
    --------
    >>> from mhc_layers.parallel.recompute import block_boundaries
    >>> block_boundaries([5, 4], num_streams=4, block=3)
    [(0, 3), (3, 5), (5, 8), (8, 9)]
    """
    if block is not None:
        _check_block(block)
    boundaries: list[tuple[int, int]] = []
    start = 0
    for layers in stages:
        size = block_size(layers, num_streams=num_streams) if block is None else block
        boundaries.extend((first, min(first + size, start + layers)) for first in range(start, start + layers, size))
        start += layers
    return boundaries


def connection_policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective-checkpoint policy: keep what matrix products and attention computed, run the rest again.

    The connections are operators of their own (``torch.ops.mhc_layers.*``) or, in plain torch, batched products of
    n x n matrices; both are run again, and so are norms and gates. No weight is multiplied twice.

    Parameters
    ----------
    context : torch.utils.checkpoint.SelectiveCheckpointContext
        Not used.
    operator : torch._ops.OpOverload
        What is about to run.
    *args, **kwargs
        Its arguments; not used.

    Returns
    -------
    torch.utils.checkpoint.CheckpointPolicy
        ``MUST_SAVE`` for products with weights and for attention, ``PREFER_RECOMPUTE`` for everything else.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers.parallel.recompute import connection_policy
    >>> connection_policy(None, torch.ops.aten.mm.default).name
    'MUST_SAVE'
    >>> connection_policy(None, torch.ops.aten.bmm.default).name
    'PREFER_RECOMPUTE'
    """
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def apply_recompute(
    model: Transformer, *, stages: Sequence[int] | None = None, block: int | None = None, compiled: bool = False
) -> None:
    """Make a model's forward pass recompute its connections in blocks of sites.

    Parameters
    ----------
    model : Transformer
        Changed in place: its ``walk`` becomes a :class:`RecomputedWalk` or a :class:`SelectiveWalk`. Its own
        ``recompute_layers``, which runs the sublayers again as well, must be off.
    stages : sequence of int, optional
        Sites of each pipeline stage; all in one by default.
    block : int, optional
        Sites of a block; the argmin of :func:`recompute_elements` by default.
    compiled : bool
        Whether ``torch.compile`` will trace the model. It cannot trace hooks on saved tensors, so a
        :class:`SelectiveWalk` is taken.

    Raises
    ------
    ValueError
        If ``recompute_layers`` is on, the stages do not add up to the model's sites, or ``block`` is smaller than 1.
    """
    if model.config.recompute_layers:
        raise ValueError(
            f"model.recompute_layers is {model.config.recompute_layers} and parallel.recompute is on; set one to 0"
        )
    sizes = [len(model.sites)] if stages is None else stages
    if sum(sizes) != len(model.sites):
        raise ValueError(
            f"stages are {list(sizes)}, {sum(sizes)} sites; the model has {len(model.sites)}, give all of them"
        )
    boundaries = block_boundaries(sizes, num_streams=model.config.num_streams, block=block)
    if compiled:
        model.walk = SelectiveWalk(model.walk, boundaries)  # type: ignore[method-assign]
        return
    starts = {id(model.sites[first]) for first, _ in boundaries}
    model.walk = RecomputedWalk(model.walk, starts)  # type: ignore[method-assign]


class RecomputedWalk:
    """Passes streams through sites in recompute blocks; stands in for :meth:`Transformer.walk`.

    Parameters
    ----------
    walk : callable
        The walk it replaces, used where no gradient is needed or keys and values are cached.
    starts : set of int
        ``id`` of every site that starts a block.
    """

    def __init__(self, walk: Callable[..., WalkState], starts: set[int]) -> None:
        self._walk = walk
        self._starts = starts

    def __call__(
        self, state: WalkState, context: StepContext, sites: Sequence[HyperConnection] | None = None
    ) -> WalkState:
        if not torch.is_grad_enabled() or context.caches is not None:
            return self._walk(state, context, sites)
        if sites is None:
            sites = list(self._walk.__self__.sites)  # type: ignore[attr-defined]
        first = 0
        while first < len(sites):
            last = first + 1
            while last < len(sites) and id(sites[last]) not in self._starts:
                last += 1
            state = _Block(sites[first:last], state).run(context)
            first = last
        return state


class SelectiveWalk:
    """Passes streams through all sites in selectively checkpointed blocks; ``torch.compile(fullgraph=True)`` traces it.

    Under the compiler, only what the backward pass needs of the kept operators' results is stored, and what is run
    again is fused. Without it, every result of a kept operator is stored.

    Parameters
    ----------
    walk : callable
        The walk it replaces, used where no gradient is needed, keys and values are cached, or sites are given.
    boundaries : sequence of (int, int)
        First and one-past-last site of each block; together all sites, in order.
    policy : callable
        What is kept, :func:`connection_policy` by default.
    """

    def __init__(
        self,
        walk: Callable[..., WalkState],
        boundaries: Sequence[tuple[int, int]],
        policy: Callable[..., CheckpointPolicy] = connection_policy,
    ) -> None:
        self._walk = walk
        self._boundaries = list(boundaries)
        self._contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def __call__(
        self, state: WalkState, context: StepContext, sites: Sequence[HyperConnection] | None = None
    ) -> WalkState:
        if not torch.is_grad_enabled() or context.caches is not None or sites is not None:
            return self._walk(state, context, sites)
        every = list(self._walk.__self__.sites)  # type: ignore[attr-defined]
        for first, last in self._boundaries:
            state = WalkState(
                *checkpoint(
                    self._walk,
                    state,
                    context,
                    every[first:last],
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=self._contexts,
                )
            )
        return state


class _Block:
    """One block of sites: runs forward keeping little, and rebuilds the rest when the backward pass asks.

    Tensors that the connections save are replaced by their number in the order of saving. The first one that the
    backward pass asks for triggers :meth:`_rebuild`, which runs the connections again (with the kept outputs in place
    of the sublayers) and collects what they save, in the same order. Tensors that a sublayer saves are kept, except
    its input, which is rebuilt with the block; a norm that a sublayer applies itself is kept.
    """

    def __init__(self, sites: Sequence[HyperConnection], state: WalkState) -> None:
        self.sites = sites
        self.x, self.h_pre = state.x.detach(), None if state.h_pre is None else state.h_pre.detach()
        self.x.requires_grad_(state.x.requires_grad)
        if self.h_pre is not None and state.h_pre is not None:
            self.h_pre.requires_grad_(state.h_pre.requires_grad)
        self.state = state
        self.outputs: list[Tensor] = []
        self.num_saved = 0
        self.waiting = 0
        self.saved: dict[int, Tensor] = {}
        # fused sites need no second run: one kernel rebuilds the streams from the kept coefficients
        fused = StreamRebuilder.serves(sites, state.x)
        self.rebuilder = StreamRebuilder(sites, self.x, self.h_pre) if fused else None
        self.inputs: list[Tensor] = []
        device = state.x.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def run(self, context: StepContext) -> WalkState:
        aux_loss = self.state.aux_loss

        def sublayer(index: int, u: Tensor) -> Tensor:
            nonlocal aux_loss
            site = self.sites[index]
            with _SublayerHooks(self, index, u):
                result = site.sublayer(u, context)  # type: ignore[misc]
            if isinstance(result, tuple):
                result, aux = result
                aux_loss = aux if aux_loss is None else aux_loss + aux
            self.outputs.append(result.detach().requires_grad_(result.requires_grad))
            return result

        with saved_tensors_hooks(self._pack, self._unpack):
            x, h_pre = self._connect(self.state.x, self.state.h_pre, sublayer)
        del self.state
        return WalkState(x, h_pre, aux_loss)

    def _connect(
        self, x: Tensor, h_pre: Tensor | None, sublayer: Callable[[int, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Run the connections of the block around ``sublayer(index, u)``."""
        u, state = self.sites[0].pre(x, h_pre, broadcast=x.shape[-2] < self.sites[0].num_streams)
        for index, site in enumerate(self.sites):
            if self.rebuilder is not None:
                self.rebuilder.see(state)
            f = sublayer(index, u)
            if index + 1 < len(self.sites):
                x, u, state = site.boundary(x, f, state, self.sites[index + 1])
            else:
                x = site.post(x, f, state)
        return x, state.h_pre

    def _pack(self, tensor: Tensor) -> int | Tensor:
        if self.rebuilder is not None:
            number = self.rebuilder.number(tensor)
            if number is None:
                return tensor.detach()
            self.waiting += 1
            return number
        self.num_saved += 1
        self.waiting += 1
        return self.num_saved - 1

    def _unpack(self, number: int | Tensor) -> Tensor:
        if isinstance(number, Tensor):
            return number
        if number not in self.saved:
            self._rebuild()
        tensor = self.saved.pop(number) if self.rebuilder is None else self.saved[number]
        self._taken()
        return tensor

    def input(self, index: int) -> Tensor:
        """Return the input of a site's sublayer, rebuilding the block if needed."""
        if not self.inputs:
            self._rebuild()
        tensor = self.inputs[index]
        self._taken()
        return tensor

    def _taken(self) -> None:
        """Forget what was rebuilt once everything has been asked for."""
        self.waiting -= 1
        if self.waiting <= 0:
            self.saved.clear()
            self.inputs.clear()

    def _rebuild(self) -> None:
        if self.rebuilder is not None:
            streams, self.inputs = self.rebuilder.rebuild(self.outputs)
            self.saved = dict(enumerate(streams))
            return
        saved: list[Tensor] = []
        inputs: list[Tensor] = []

        def keep(tensor: Tensor) -> int:
            saved.append(tensor.detach())
            return len(saved) - 1

        def sublayer(index: int, u: Tensor) -> Tensor:
            inputs.append(u.detach())
            return self.outputs[index]

        device, dtype, enabled = self.autocast
        with (
            torch.enable_grad(),
            torch.autocast(device, dtype=dtype, enabled=enabled),
            saved_tensors_hooks(keep, saved.__getitem__),
        ):
            self._connect(self.x, self.h_pre, sublayer)
        if len(saved) != self.num_saved:
            raise RuntimeError(
                f"rebuilding a recompute block saved {len(saved)} tensors, the forward pass {self.num_saved}; the "
                "connections must do the same operations both times"
            )
        self.saved = dict(enumerate(saved))
        self.inputs = inputs


class _SublayerHooks:
    """While a sublayer runs: keep what it saves, but not its input u, which the site has normalised, or views of it."""

    def __init__(self, block: _Block, index: int, u: Tensor) -> None:
        self._block, self._index = block, index
        # only a plain tensor that fills its storage has an address that says what is a view of it
        plain = type(u) is Tensor and u.is_contiguous() and u.storage_offset() == 0
        self._u = (u.untyped_storage().data_ptr() or None) if plain else None
        self._dtype = u.dtype
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> None:
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        # the hooks hold this object: as a cycle they would keep the whole block until a garbage collection
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__(*error)

    @torch.compiler.disable
    def _pack(self, tensor: Tensor) -> Tensor | _ViewOfInput:
        if tensor.untyped_storage().data_ptr() != self._u or tensor.dtype != self._dtype:
            return tensor.detach()  # a node that saves its own output would be a cycle otherwise
        self._block.waiting += 1
        return _ViewOfInput(tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    @torch.compiler.disable
    def _unpack(self, packed: Tensor | _ViewOfInput) -> Tensor:
        return packed if isinstance(packed, Tensor) else self._block.input(self._index).contiguous().as_strided(*packed)


class _ViewOfInput(NamedTuple):
    """How a sublayer sees its input where it saves it: products look at it as a matrix, or at its transpose."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int
