"""Checkpoints of other code: DeepSeek-V4's ``hc_*`` tensors, transformers' names, and layouts of phi.

Three things differ between code bases that hold the same connection: the names of the tensors, the shape of phi
(rows or columns, streams or channels first), and whether the residual block is stored transposed. A :class:`Layout`
says the last two, a *naming* the first. Only the connection tensors of a checkpoint are read, so a site can be studied
without the model around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mhc_layers.config import TransformerConfig
from mhc_layers.conventions import Convention
from mhc_layers.hyper_connection import HyperConnection
from mhc_layers.models.readout import HyperHead
from mhc_layers.models.transformer import Transformer

__all__ = [
    "DEEPSEEK",
    "LAYOUTS",
    "MAXTEXT",
    "MEGATRON",
    "NAMINGS",
    "PAPER_LAYOUT",
    "Layout",
    "SiteTensors",
    "connection_tensors",
    "convert_layout",
    "layout_of",
    "load_connections",
    "load_model",
    "load_site",
    "read_connections",
    "save_connections",
    "save_model",
    "site_tensors",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How phi and the bias of a site are stored.

    Parameters
    ----------
    matrix : {"rows", "columns"}
        phi is ``[N, K]`` with an output in each row, or ``[K, N]``; N = (n + 2) n, K = n C.
    vector : {"streams", "channels"}
        Order of the K inputs: stream-major, index ``i * C + c``, or channel-major, index ``c * n + i``.
    transposed : bool
        The residual block is ``[source, destination]``, so that its projection is applied transposed; otherwise it is
        ``[output, input]`` of the operator itself.
    """

    matrix: Literal["rows", "columns"] = "rows"
    vector: Literal["streams", "channels"] = "streams"
    transposed: bool = False


DEEPSEEK = Layout(transposed=True)
"""DeepSeek-V4, transformers and TileKernels: ``fn [N, K]``, stream-major, ``comb[source, destination]``."""

PAPER_LAYOUT = Layout(matrix="columns")
"""The paper's notation: ``phi [K, N]``, stream-major, the operator itself."""

MEGATRON = Layout()
"""Megatron-LM main, and this library's own storage in the convention PAPER: ``[N, K]``, the operator itself."""

MAXTEXT = Layout(matrix="columns", transposed=True)
"""MaxText (its three kernels concatenated): ``[K, N]``, applied transposed."""

LAYOUTS = {"deepseek": DEEPSEEK, "paper": PAPER_LAYOUT, "megatron": MEGATRON, "maxtext": MAXTEXT}
"""The layouts by name."""


def layout_of(convention: Convention) -> Layout:
    """Return the layout in which a site of this convention stores its parameters."""
    return Layout(transposed=convention.transposed)


def convert_layout(
    phi: Tensor, bias: Tensor, num_streams: int, source: Layout, target: Layout
) -> tuple[Tensor, Tensor]:
    """Store the same maps in another layout.

    Parameters
    ----------
    phi : Tensor
        ``[N, K]`` or ``[K, N]`` as ``source`` says.
    bias : Tensor
        ``[N]``, ordered pre, post, res.
    num_streams : int
        n.
    source, target : Layout
        From and to.

    Returns
    -------
    phi, bias : Tensor
        New contiguous tensors. The logits of pre and post are the same for the same streams, and those of the
        residual block are the same or its transpose.

    Raises
    ------
    ValueError
        If the shapes do not fit the source layout.

    Notes
    -----
    A layout is not a convention: with the epsilons of DeepSeek-V4 the projection itself is another function than the
    paper's, and converting the storage does not change which one a model was trained with.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers.hub import DEEPSEEK, PAPER_LAYOUT, convert_layout
    >>> phi, bias = convert_layout(torch.randn(24, 32), torch.randn(24), 4, DEEPSEEK, PAPER_LAYOUT)
    >>> phi.shape
    torch.Size([32, 24])
    """
    n, rows = num_streams, (num_streams + 2) * num_streams
    matrix = phi.mT if source.matrix == "columns" else phi
    if matrix.dim() != 2 or matrix.shape[0] != rows or matrix.shape[1] % n or bias.shape != (rows,):
        raise ValueError(
            f"For {n} streams in the layout {source}, phi must have {rows} outputs and a multiple of {n} inputs and "
            f"the bias shape ({rows},); got {tuple(phi.shape)} and {tuple(bias.shape)}."
        )
    if source.vector != target.vector:
        shape = (n, -1) if source.vector == "streams" else (-1, n)
        matrix = matrix.unflatten(1, shape).transpose(1, 2).flatten(1)
    if source.transposed != target.transposed:
        order = torch.arange(rows, device=phi.device)
        order[2 * n :] = order[2 * n :].view(n, n).t().flatten()
        matrix, bias = matrix[order], bias[order]
    return (matrix.mT if target.matrix == "columns" else matrix).clone(
        memory_format=torch.contiguous_format
    ), bias.clone()


@dataclasses.dataclass(frozen=True)
class SiteTensors:
    """A site or head in DeepSeek's form: ``fn [rows, n C]``, ``base [rows]``, ``scale [3]``, of a head ``[1]``."""

    fn: Tensor
    base: Tensor
    scale: Tensor


NAMINGS: dict[str, dict[str, str]] = {
    "deepseek": {
        "attention": "layers.{layer}.hc_attn_{part}",
        "feed_forward": "layers.{layer}.hc_ffn_{part}",
        "head": "hc_head_{part}",
    },
    "transformers": {
        "attention": "model.layers.{layer}.attn_hc.{part}",
        "feed_forward": "model.layers.{layer}.ffn_hc.{part}",
        "head": "model.hc_head.hc_{part}",
    },
    "transformers_v41": {
        "attention": "model.layers.{layer}.hc_attn_{part}",
        "feed_forward": "model.layers.{layer}.hc_ffn_{part}",
        "head": "model.hc_head_{part}",
    },
}
"""Names of the tensors by code base; ``part`` is fn, base or scale. The single-pass V4.1 has no head."""

PARTS = ("fn", "base", "scale")


def naming_patterns(naming: str) -> dict[str, str]:
    """Return the patterns of a naming, or say which there are."""
    if naming not in NAMINGS:
        raise ValueError(f"Unknown naming {naming!r}; accepted: {', '.join(NAMINGS)}.")
    return NAMINGS[naming]


def site_tensors(site: HyperConnection) -> SiteTensors:
    """Return a site's parameters in DeepSeek's form, whatever its convention; float32 copies, detached."""
    require_mhc(site)
    phi, bias = convert_layout(
        site.phi.detach(), site.bias.detach(), site.num_streams, layout_of(site.convention), DEEPSEEK
    )
    scale = torch.stack([site.alpha_pre.detach(), site.alpha_post.detach(), site.alpha_res.detach()])
    return SiteTensors(phi.float(), bias.float(), scale.float())


@torch.no_grad()
def load_site(site: HyperConnection, tensors: SiteTensors) -> None:
    """Copy tensors in DeepSeek's form into a site, in the layout of the site's convention.

    Parameters
    ----------
    site : HyperConnection
        Of the kind "mhc". With the convention DEEPSEEK_V4 or V4.1 it then computes what the checkpoint's model does.
    tensors : SiteTensors
        ``fn [(n + 2) n, n C]``, ``base [(n + 2) n]``, ``scale [3]``.

    Raises
    ------
    ValueError
        If the site is of another kind, or a shape does not fit.
    """
    require_mhc(site)
    _check_shapes(site, tensors)
    phi, bias = convert_layout(tensors.fn, tensors.base, site.num_streams, DEEPSEEK, layout_of(site.convention))
    site.phi.copy_(phi)
    site.bias.copy_(bias)
    for gate, value in zip((site.alpha_pre, site.alpha_post, site.alpha_res), tensors.scale.unbind(), strict=True):
        gate.copy_(value)


def require_mhc(site: HyperConnection) -> None:
    """Raise if the site's parameters are not those of the mHC layer."""
    if site.connection != "mhc" or site.res_map is not None:
        raise ValueError(
            f"Only sites of the kind 'mhc' without a res_map have DeepSeek's tensors; got {site.connection!r} with "
            f"res_map={site.res_map!r}."
        )


def _check_shapes(target: HyperConnection | HyperHead, tensors: SiteTensors) -> None:
    """Raise if tensors do not fit a site or a head."""
    if isinstance(target, HyperHead):
        what, own = "head", SiteTensors(target.fn, target.base, target.scale)
    else:
        require_mhc(target)
        what = f"site ({target.num_streams} streams of {target.dim} channels)"
        own = SiteTensors(target.phi, target.bias, target.phi.new_empty(3))
    for part in PARTS:
        wanted, got = tuple(getattr(own, part).shape), tuple(getattr(tensors, part).shape)
        if wanted != got:
            raise ValueError(
                f"The {what} takes {part} of shape {wanted}, got {got}; the model must have the checkpoint's width and "
                "number of streams."
            )


def connection_tensors(model: Transformer, naming: str = "deepseek") -> dict[str, Tensor]:
    """Return all connection tensors of a model under another code base's names.

    Parameters
    ----------
    model : Transformer
        With mHC sites.
    naming : {"deepseek", "transformers", "transformers_v41"}
        Whose names.

    Examples
    --------
    >>> from mhc_layers import Transformer, TransformerConfig
    >>> from mhc_layers.hub import connection_tensors
    >>> config = TransformerConfig(vocab_size=16, dim=8, num_layers=1, num_heads=2, convention="deepseek_v4")
    >>> sorted(connection_tensors(Transformer(config)))[:3]
    ['hc_head_base', 'hc_head_fn', 'hc_head_scale']
    """
    patterns = naming_patterns(naming)
    result = {}
    for (kind, layer), site in placed_sites(model):
        tensors = site_tensors(site)
        for part in PARTS:
            result[patterns[kind].format(layer=layer, part=part)] = getattr(tensors, part)
    head = model.readout_streams
    if isinstance(head, HyperHead):
        for part in PARTS:
            result[patterns["head"].format(part=part)] = getattr(head, part).detach().float().clone()
    return result


def placed_sites(model: Transformer) -> list[tuple[tuple[str, int], HyperConnection]]:
    """Return each site of a model with its kind ("attention" or "feed_forward") and layer."""
    sites = cast("list[HyperConnection]", list(model.sites))
    return [(("feed_forward" if index % 2 else "attention", index // 2), site) for index, site in enumerate(sites)]


def read_connections(source: str | Path | Mapping[str, Tensor], naming: str = "deepseek") -> dict[str, Tensor]:
    """Read only the connection tensors of a checkpoint.

    Parameters
    ----------
    source : path or mapping
        A safetensors file, a folder of them (with or without an index), or a mapping of names to tensors.
    naming : str
        The names in the source, a key of :data:`NAMINGS`.

    Returns
    -------
    dict
        Name to tensor, for the names that fit; float32.

    Raises
    ------
    FileNotFoundError
        If there is no safetensors file at the path.
    ValueError
        If no tensor has such a name.
    """
    stems = tuple(pattern.split("{")[0] for pattern in naming_patterns(naming).values())
    found = {
        name: tensor.float() for name, tensor in named_tensors(source, stems) if parse_name(name, naming) is not None
    }
    if not found:
        raise ValueError(
            f"No connection tensors with the naming {naming!r}, for example "
            f"{NAMINGS[naming]['attention'].format(layer=0, part='fn')!r}; accepted namings: {', '.join(NAMINGS)}."
        )
    return found


def named_tensors(source: str | Path | Mapping[str, Tensor], stems: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors whose names start with one of the stems; other tensors of a file are not read."""
    if isinstance(source, Mapping):
        yield from source.items()
        return
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"No safetensors file at {path}; give a file or a folder that holds some.")
    for file in files:
        with _whole_file(file), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is not a mapping
                if name.startswith(stems):
                    yield name, opened.get_tensor(name)


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[None]:
    """Say which file it is that cannot be read."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or write it again.") from error


def parse_name(name: str, naming: str) -> tuple[str, int, str] | None:
    """Split a tensor's name into (kind, layer, part), or return None if it is not a connection's."""
    numbers = [int(piece) for piece in name.split(".") if piece.isdigit()]
    layer = numbers[0] if numbers else -1
    for kind, pattern in naming_patterns(naming).items():
        for part in PARTS:
            if name == pattern.format(layer=layer, part=part):
                return kind, layer, part
    return None


def load_connections(
    model: Transformer, source: str | Path | Mapping[str, Tensor], naming: str = "deepseek"
) -> list[str]:
    """Load the connection tensors of a checkpoint into a model's sites and head.

    Parameters
    ----------
    model : Transformer
        Its convention decides how the tensors are laid out and used; DEEPSEEK_V4 is what they were trained for.
    source, naming
        See :func:`read_connections`.

    Returns
    -------
    list of str
        The names that were loaded. Layers that the model does not have are left out.

    Raises
    ------
    FileNotFoundError, ValueError
        As in :func:`read_connections`; and if a layer of the model is missing in the source, or a shape does not fit.
        The model is then as it was.
    """
    grouped: dict[tuple[str, int], dict[str, Tensor]] = {}
    names: dict[tuple[str, int], list[str]] = {}
    for name, tensor in read_connections(source, naming).items():
        kind, layer, part = cast("tuple[str, int, str]", parse_name(name, naming))
        grouped.setdefault((kind, layer), {})[part] = tensor
        names.setdefault((kind, layer), []).append(name)
    targets: list[tuple[tuple[str, int], HyperConnection | HyperHead]] = [*placed_sites(model)]
    if isinstance(model.readout_streams, HyperHead):
        targets.append((("head", -1), model.readout_streams))
    for key, target in targets:
        parts = grouped.get(key, {})
        if set(parts) != set(PARTS):
            raise ValueError(f"The source has {sorted(parts)} of {key[0]}, layer {key[1]}; needed: {', '.join(PARTS)}.")
        _check_shapes(target, SiteTensors(**parts))
    for key, target in targets:
        tensors = SiteTensors(**grouped[key])
        if isinstance(target, HyperHead):
            load_head(target, tensors)
        else:
            load_site(target, tensors)
    return [name for key, _ in targets for name in names[key]]


@torch.no_grad()
def load_head(head: HyperHead, tensors: SiteTensors) -> None:
    """Copy ``fn [n, n C]``, ``base [n]``, ``scale [1]`` into a head."""
    _check_shapes(head, tensors)
    for part in PARTS:
        getattr(head, part).copy_(getattr(tensors, part))


def save_connections(model: Transformer, path: str | Path, naming: str = "deepseek") -> None:
    """Write all connection tensors of a model to one safetensors file, see :func:`connection_tensors`."""
    tensors = connection_tensors(model, naming)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _write(tensors, Path(path))


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path} can't be written ({error}); make room, or choose another path") from error


def save_model(model: Transformer, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` of a whole model; a tied head is stored once."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["head.weight"]
    _write(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


def load_model(folder: str | Path) -> Transformer:
    """Read what :func:`save_model` wrote.

    Raises
    ------
    FileNotFoundError
        If the folder lacks one of the two files.
    ValueError
        If one of them is cut short, or is of another version.
    """
    folder = Path(folder)
    model = Transformer(TransformerConfig.from_dict(json.loads((folder / "config.json").read_text())))
    with _whole_file(folder / "model.safetensors"):
        state = load_file(folder / "model.safetensors")
    if model.config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    model.to(state["embedding.weight"].dtype)  # a model that was saved in bfloat16 is loaded in bfloat16
    model.load_state_dict(state)
    return model
