"""hub.py: names, layouts and files of other code bases."""

import pytest
import torch
from safetensors.torch import save_file

from mhc_layers import DEEPSEEK_V4, PAPER, HyperConnection, hub
from mhc_layers.hub import DEEPSEEK, LAYOUTS, MAXTEXT, MEGATRON, PAPER_LAYOUT, Layout, SiteTensors, convert_layout
from tests.mhc_layers.test_hyper_connection import randomised as randomised_site
from tests.mhc_layers.test_hyper_connection import streams
from tests.mhc_layers.test_transformer import build, randomised, tokens

CHANNELS_FIRST = Layout(vector="channels")


def logits(phi, bias, x, layout):
    """What a reader of this layout computes from streams ``(n, C)``: pre and post, and the operator's logits."""
    n = x.shape[0]
    vector = x.flatten() if layout.vector == "streams" else x.t().flatten()
    raw = (phi if layout.matrix == "rows" else phi.t()) @ vector + bias
    block = raw[2 * n :].view(n, n)
    return raw[: 2 * n], block.t() if layout.transposed else block


@pytest.mark.parametrize("source", [*LAYOUTS.values(), CHANNELS_FIRST], ids=[*LAYOUTS, "channels"])
@pytest.mark.parametrize("target", [*LAYOUTS.values(), CHANNELS_FIRST], ids=[*LAYOUTS, "channels"])
def test_every_layout_describes_the_same_maps(source, target):
    generator = torch.Generator().manual_seed(0)
    n, channels = 3, 4
    shape = (15, 12) if source.matrix == "rows" else (12, 15)
    phi, bias = torch.randn(shape, generator=generator), torch.randn(15, generator=generator)
    x = torch.randn(n, channels, generator=generator)
    converted = convert_layout(phi, bias, n, source, target)
    for before, after in zip(logits(phi, bias, x, source), logits(*converted, x, target), strict=True):
        torch.testing.assert_close(after, before)
    back = convert_layout(*converted, n, target, source)
    assert torch.equal(back[0], phi) and torch.equal(back[1], bias)
    assert converted[0].is_contiguous() and converted[0].data_ptr() != phi.data_ptr()


def test_shapes_of_the_layouts():
    phi, bias = torch.randn(24, 32), torch.randn(24)
    assert convert_layout(phi, bias, 4, DEEPSEEK, PAPER_LAYOUT)[0].shape == (32, 24)
    assert torch.equal(convert_layout(phi, bias, 4, DEEPSEEK, MAXTEXT)[0], phi.t())
    assert not torch.equal(convert_layout(phi, bias, 4, DEEPSEEK, MEGATRON)[0], phi)
    with pytest.raises(ValueError, match=r"\(32, 24\)"):
        convert_layout(phi.t(), bias, 4, DEEPSEEK, PAPER_LAYOUT)
    with pytest.raises(ValueError, match="bias shape"):
        convert_layout(phi, bias[:20], 4, DEEPSEEK, PAPER_LAYOUT)


@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK_V4])
def test_site_round_trip(convention):
    site, other = (randomised_site(HyperConnection(8, 4, convention=convention), seed) for seed in (0, 1))
    hub.load_site(other, hub.site_tensors(site))
    for one, two in zip(site.coefficients(streams(5)), other.coefficients(streams(5)), strict=True):
        assert torch.equal(one, two)


def test_the_residual_block_is_turned_between_conventions():
    """The same DeepSeek tensors in a PAPER site: the operator agrees where the epsilons do not matter."""
    tensors = SiteTensors(torch.randn(24, 32) / 32**0.5, torch.randn(24), torch.tensor([1.0, 1.0, 0.5]))
    operators = []
    for convention in (PAPER, DEEPSEEK_V4):
        site = HyperConnection(8, 4, convention=convention)
        hub.load_site(site, tensors)
        operators.append(site.coefficients(streams(5))[2])
    torch.testing.assert_close(*operators, rtol=0, atol=1e-3)
    assert float((operators[0] - operators[1].mT).abs().max().detach()) > 0.05


def test_only_mhc_sites_have_these_tensors():
    with pytest.raises(ValueError, match="kind 'mhc'"):
        hub.site_tensors(HyperConnection(8, connection="hc"))
    with pytest.raises(ValueError, match="res_map"):
        hub.site_tensors(HyperConnection(8, res_map="Circulant"))
    with pytest.raises(ValueError, match="4 streams of 8 channels"):
        hub.load_site(HyperConnection(8), SiteTensors(torch.zeros(24, 64), torch.zeros(24), torch.zeros(3)))


@pytest.mark.parametrize("naming", hub.NAMINGS)
@pytest.mark.parametrize("convention", ["deepseek_v4", "deepseek_v41"])
def test_model_round_trip_through_a_file(naming, convention, tmp_path):
    model = randomised(build(convention=convention))
    other = build(seed=0, convention=convention)  # the same body, other connections
    assert not torch.equal(other(tokens()), model(tokens()))
    hub.save_connections(model, tmp_path / "new" / "hc.safetensors", naming)
    loaded = hub.load_connections(other, tmp_path / "new" / "hc.safetensors", naming)
    assert len(loaded) == 4 * 3 + (3 if convention == "deepseek_v4" else 0)
    torch.testing.assert_close(other(tokens()), model(tokens()))


def test_published_names():
    model = build(convention="deepseek_v4")
    deepseek = hub.connection_tensors(model)
    assert deepseek["layers.1.hc_attn_fn"].shape == (24, 4 * 32)
    assert deepseek["layers.0.hc_ffn_base"].shape == (24,)
    assert deepseek["layers.0.hc_ffn_scale"].shape == (3,)
    assert deepseek["hc_head_fn"].shape == (4, 128) and deepseek["hc_head_scale"].shape == (1,)
    transformers = hub.connection_tensors(model, "transformers")
    assert {"model.layers.1.attn_hc.fn", "model.layers.0.ffn_hc.scale", "model.hc_head.hc_base"} <= set(transformers)
    assert all(tensor.dtype == torch.float32 for tensor in (*deepseek.values(), *transformers.values()))


def test_only_connection_tensors_are_read(tmp_path):
    """Shards of a large checkpoint: everything else in them stays on disk, and layers we lack are left out."""
    source = hub.connection_tensors(randomised(build(convention="deepseek_v4", num_layers=3)))
    others = {"layers.0.attn.wq.weight": torch.zeros(4, 4), "layers.0.hc_attn_fn_extra": torch.zeros(1)}
    names = sorted(source)
    save_file({name: source[name].to(torch.bfloat16) for name in names[:9]} | others, tmp_path / "a.safetensors")
    save_file({name: source[name] for name in names[9:]}, tmp_path / "b.safetensors")
    read = hub.read_connections(tmp_path)
    assert sorted(read) == names
    assert all(tensor.dtype == torch.float32 for tensor in read.values())
    loaded = hub.load_connections(build(convention="deepseek_v4"), tmp_path)
    assert not [name for name in loaded if name.startswith("layers.2")]


def test_missing_things(tmp_path):
    model = build(convention="deepseek_v4")
    tensors = hub.connection_tensors(model)
    with pytest.raises(ValueError, match="accepted namings"):
        hub.read_connections({"lm_head.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="accepted: deepseek"):
        hub.connection_tensors(model, "megatron")
    with pytest.raises(FileNotFoundError, match="No safetensors"):
        hub.read_connections(tmp_path)
    del tensors["layers.1.hc_ffn_scale"]
    with pytest.raises(ValueError, match=r"\['base', 'fn'\] of feed_forward, layer 1"):
        hub.load_connections(model, tensors)
    with pytest.raises(ValueError, match="The head takes fn of shape"):
        hub.load_head(model.readout_streams, SiteTensors(torch.zeros(4, 4), torch.zeros(4), torch.zeros(1)))


@pytest.mark.parametrize("spoil", ["hc_head_base", "layers.1.hc_ffn_base", "layers.1.hc_ffn_scale"])
def test_a_load_that_fails_changes_nothing(spoil):
    model, tensors = (
        build(convention="deepseek_v4"),
        hub.connection_tensors(randomised(build(convention="deepseek_v4"))),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"takes {spoil.rpartition('_')[2]} of shape .* got \(7,\)"):
        hub.load_connections(model, tensors | {spoil: torch.zeros(7)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_that_are_cut_or_cannot_be_written_are_named(tmp_path):
    model = build(convention="deepseek_v4")
    hub.save_connections(model, tmp_path / "hc.safetensors")
    hub.save_model(model, tmp_path / "model")
    for path, load in (
        (tmp_path / "hc.safetensors", lambda path: hub.load_connections(model, path)),
        (tmp_path / "model" / "model.safetensors", lambda path: hub.load_model(path.parent)),
    ):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=f"{path.name} is not a whole safetensors file"):
            load(path)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OSError, match=r"folder.safetensors can't be written"):
        hub.save_connections(model, tmp_path / "folder.safetensors")


@pytest.mark.parametrize("changes", [{}, {"connection": "hc"}, {"convention": "deepseek_v4", "tie_embeddings": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_model_round_trip(changes, dtype, tmp_path):
    model = randomised(build(**changes)).to(dtype)
    hub.save_model(model, tmp_path / "model")
    other = hub.load_model(tmp_path / "model")
    assert other.config == model.config
    assert torch.equal(other(tokens()), model(tokens()))
    for name, value in model.state_dict().items():
        assert other.state_dict()[name].dtype == value.dtype, name
