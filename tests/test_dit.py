"""The DiT against diffusers' WanTransformer3DModel, and against its own shortcuts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from swifti2v.engine.dit import DiT, TextKV
from swifti2v.engine.presets import SWIFTI2V_STAGE2, WAN21_I2V_14B, WAN22_I2V_A14B, WAN22_TI2V_5B
from swifti2v.engine.profile import DiTConfig
from swifti2v.engine.rope import rope_tables
from swifti2v.engine.weights import load_dit

HEADS, HEAD_DIM, LAYERS = 3, 32, 3  # 32 is shared 12, 10, 10 among time, height and width
DIM = HEADS * HEAD_DIM


def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter a value that a mistake would show, keeping activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("scale_shift_table"):
                parameter.copy_(0.3 * noise)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise)


def make_theirs(seed: int, channels: tuple[int, int], image_dim: int | None = None) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=channels[0],
        out_channels=channels[1],
        text_dim=40,
        freq_dim=64,
        ffn_dim=160,
        num_layers=LAYERS,
        image_dim=image_dim,
        added_kv_proj_dim=DIM if image_dim else None,
    )
    randomise(model, seed)
    return model.eval()


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> tuple[WanTransformer3DModel, DiT, Path]:
    theirs, folder = make_theirs(1, (12, 4), image_dim=48), tmp_path_factory.mktemp("i2v")
    theirs.save_pretrained(folder)
    return theirs, load_dit(folder), folder


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> tuple[WanTransformer3DModel, DiT, Path]:
    theirs, folder = make_theirs(2, (6, 6)), tmp_path_factory.mktemp("ti2v")
    theirs.save_pretrained(folder)
    return theirs, load_dit(folder), folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class GapRope(nn.Module):
    """diffusers' own tables, looked up at any block positions."""

    def __init__(self, rope: Any, positions: list[int]) -> None:
        super().__init__()
        self.positions = positions
        self.tables, self.sizes = (rope.freqs_cos, rope.freqs_sin), (rope.t_dim, rope.h_dim, rope.w_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, _, _, height, width = x.shape
        grid = torch.cartesian_prod(torch.tensor(self.positions), torch.arange(height // 2), torch.arange(width // 2))

        def table(values: Tensor) -> Tensor:
            parts = [part[rows] for part, rows in zip(values.split(self.sizes, dim=1), grid.unbind(1), strict=True)]
            return torch.cat(parts, dim=1)[None, :, None]  # [L, D] -> [1, L, 1, D]

        return table(self.tables[0]), table(self.tables[1])


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def inputs(seed: int, channels: int, blocks: int, height: int, width: int, text_len: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, channels, blocks, height, width, generator=generator)
    return latents, torch.randn(2, text_len, 40, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(10, 14), (6, 22)])
def test_image_to_video_equals_diffusers(i2v, height: int, width: int):
    theirs, ours, _ = i2v
    latents, text = inputs(3, 12, 3, height, width, 512)
    image, t = torch.randn(2, 257, 48), torch.tensor([937.5, 20.0])
    want = theirs(latents, t, text, image, return_dict=False)[0]
    got = ours.denoise(latents, t[:, None].expand(2, 3), text, image)
    assert got.shape == want.shape == (2, 4, 3, height, width)
    assert 0.1 < float(want.std()) < 10
    assert relative(got, want) <= 1e-5


@torch.no_grad()
def test_image_tokens_change_the_result(i2v):
    _, ours, _ = i2v
    latents, text = inputs(3, 12, 2, 6, 10, 16)
    t = torch.full((2, 2), 500.0)
    a, b = (ours.denoise(latents, t, text, torch.randn(2, 9, 48)) for _ in range(2))
    assert relative(a, b) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, [0, 9, 10, 11, 12], [7, 3, 0, 1023, 500]])
def test_a_timestep_for_each_block_equals_diffusers(ti2v, positions: list[int] | None):
    theirs, ours, _ = ti2v
    latents, text = inputs(4, 6, 5, 10, 14, 24)
    t = torch.tensor([[0.0, 0, 937.5, 937.5, 937.5], [0, 31.25, 0, 625, 1000]])
    rope = theirs.rope
    if positions:
        theirs.rope = GapRope(rope, positions)
    try:
        want = theirs(latents, t.repeat_interleave(5 * 7, dim=1), text, return_dict=False)[0]
    finally:
        theirs.rope = rope
    assert relative(ours.denoise(latents, t, text, positions=positions), want) <= 1e-5


@torch.no_grad()
def test_positions_matter(ti2v):
    _, ours, _ = ti2v
    latents, text = inputs(4, 6, 3, 6, 10, 8)
    t = torch.full((2, 3), 500.0)
    near, far = ours.denoise(latents, t, text), ours.denoise(latents, t, text, positions=[0, 9, 10])
    shifted = ours.denoise(latents, t, text, positions=[5, 14, 15])
    assert relative(near, far) > 1e-3
    assert relative(shifted, far) < 1e-5, "attention sees differences of positions only"


def window(model: DiT, seed: int, blocks: int = 4) -> tuple:
    """The inputs of DiT.forward for a window of 5x7 tokens a block, two clean blocks first."""
    latents, text = inputs(seed, model.config.in_channels, blocks, 10, 14, 8)
    tables = model.time_tables(torch.tensor([0.0, 833.3]))
    rows = (torch.arange(blocks) >= 2).long().expand(2, blocks)
    rope = rope_tables(model.config.head_dim, [0, *range(4, 3 + blocks)], 5, 7)
    return latents, *tables, rows, rope, model.text_kv(text)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_the_last_layer_changes_no_value(ti2v, keep: int):
    _, ours, _ = ti2v
    arguments = window(ours, 5)
    full = ours(*arguments)
    pruned = ours(*arguments, keep=keep)
    assert pruned.shape[2] == keep
    torch.testing.assert_close(pruned, full[:, :, -keep:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("keep", [None, 2])
def test_a_mask_of_all_true_is_no_mask(ti2v, keep: int | None):
    _, ours, _ = ti2v
    arguments = window(ours, 6)
    mask = torch.ones(4 * 35, 4 * 35, dtype=torch.bool)
    torch.testing.assert_close(
        ours(*arguments, mask=mask, keep=keep), ours(*arguments, keep=keep), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_a_one_way_mask_hides_the_noisy_blocks_from_the_clean_ones(ti2v):
    _, ours, _ = ti2v
    latents, *rest = window(ours, 7)
    noisy = (torch.arange(4) >= 2).repeat_interleave(35)  # [L]
    mask = ~(~noisy[:, None] & noisy[None, :])
    other = latents.clone()
    other[:, :, 2:] += 1
    a, b = ours(latents, *rest, mask=mask), ours(other, *rest, mask=mask)
    torch.testing.assert_close(a[:, :, :2], b[:, :, :2], rtol=1e-5, atol=1e-5)
    assert relative(a[:, :, 2:], b[:, :, 2:]) > 1e-2
    kept = ours(latents, *rest, mask=mask, keep=2)
    torch.testing.assert_close(kept, a[:, :, 2:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bf16_stays_near_fp32(ti2v, i2v):
    for (_, ours, folder), channels in ((ti2v, 6), (i2v, 12)):
        half = load_dit(folder, dtype=torch.bfloat16)
        latents, text = inputs(8, channels, 3, 10, 14, 32)
        t = torch.tensor([[0.0, 625, 625], [0, 937.5, 937.5]])
        image = torch.randn(2, 9, 48) if channels == 12 else None
        want = ours.denoise(latents, t, text, image)
        got = half.denoise(latents.bfloat16(), t, text.bfloat16(), None if image is None else image.bfloat16())
        assert got.dtype == torch.bfloat16
        assert relative(got, want) <= 2e-2


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (WAN21_I2V_14B, 16_394_878_784),
        (WAN22_I2V_A14B, 14_288_901_184),
        (WAN22_TI2V_5B, 4_999_787_712),
        (SWIFTI2V_STAGE2, 5_000_377_536),
    ],
)
def test_parameter_counts_of_the_public_models(config: DiTConfig, want: int):
    with torch.device("meta"):
        assert sum(p.numel() for p in DiT(config).parameters()) == want


def prompt_flops(c: DiTConfig) -> int:
    """Multiply-adds, twice, of what is computed once a prompt: text and image embeddings, their keys and values."""
    d, tokens = c.dim, c.text_len + (c.image_tokens if c.image_dim else 0)
    image = 2 * c.image_tokens * (c.image_dim**2 + c.image_dim * d) if c.image_dim else 0
    return 2 * c.text_len * (c.text_dim * d + d * d) + image + c.layers * 4 * tokens * d * d


def step_flops(c: DiTConfig, tokens: int, kept: int) -> int:
    """Of one forward over `tokens`, of which the last `kept` leave the last layer."""
    d, context = c.dim, c.text_len + (c.image_tokens if c.image_dim else 0)

    def layer(asked: int) -> int:
        attention = 4 * tokens * d * d + 4 * asked * d * d + 4 * asked * tokens * d  # k and v, q and o, the core
        return attention + 4 * asked * d * d + 4 * asked * context * d + 4 * asked * d * c.ffn_dim

    ends = 8 * tokens * c.in_channels * d + 8 * kept * d * c.out_channels
    return (c.layers - 1) * layer(tokens) + layer(kept) + ends


def counted(config: DiTConfig, blocks: int, height: int, width: int, keep: int, rows: int) -> tuple[int, int, int]:
    """FLOPs as PyTorch counts them: of the time tables, of the prompt, of one forward. Nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        model, totals = DiT(config), []
        with FlopCounterMode(display=False) as counter:
            tables = model.time_tables(torch.empty(rows))
            totals.append(counter.get_total_flops())
            image = torch.empty(1, config.image_tokens, config.image_dim) if config.image_dim else None
            kv: TextKV = model.text_kv(torch.empty(1, config.text_len, config.text_dim), image)
            totals.append(counter.get_total_flops())
            rope = torch.empty(2, blocks * (height // 2) * (width // 2), config.head_dim // 2)
            latents = torch.empty(1, config.in_channels, blocks, height, width)
            slots = torch.empty(1, blocks, dtype=torch.long)
            out = model(latents, *tables, slots, (rope[0], rope[1]), kv, keep=keep)
            totals.append(counter.get_total_flops())
    assert out.shape == (1, config.out_channels, keep, height, width)
    return totals[0], totals[1] - totals[0], totals[2] - totals[1]


CASES = [
    # config, blocks, latent height and width, blocks kept, modulation rows, TFLOP of everything in the published tables
    pytest.param(SWIFTI2V_STAGE2, 5, 88, 160, 5, 2, 271.0, id="stage2"),
    pytest.param(SWIFTI2V_STAGE2, 5, 88, 160, 3, 2, None, id="stage2-pruned"),
    pytest.param(WAN21_I2V_14B, 21, 44, 80, 21, 1, 736.5, id="stage1-wan21"),
    pytest.param(WAN22_I2V_A14B, 21, 44, 80, 21, 1, 731.6, id="stage1-wan22"),
]


@pytest.mark.parametrize(("config", "blocks", "height", "width", "keep", "rows", "teraflops"), CASES)
def test_flops_at_real_size(
    config: DiTConfig, blocks: int, height: int, width: int, keep: int, rows: int, teraflops: float | None
):
    """The published numbers count the prompt and the time embedding in every step, and all blocks in the last layer.

    Here the first two are computed once and the last layer asks for the kept blocks only, so a step costs less.
    """
    time, prompt, step = counted(config, blocks, height, width, keep, rows)
    d, tokens = config.dim, height // 2 * (width // 2)
    assert time == 2 * rows * (config.freq_dim * d + d * d + 6 * d * d)
    assert prompt == prompt_flops(config)
    assert step == step_flops(config, blocks * tokens, keep * tokens)
    if teraflops is not None:
        assert round((time + prompt + step) / 1e12, 1) == teraflops
    else:
        saved = step_flops(config, blocks * tokens, blocks * tokens) - step
        head = 8 * (blocks - keep) * tokens * d * config.out_channels
        assert round((saved - head) / 1e12, 2) == 3.34, "the last layer; its clean blocks give keys and values only"
        assert round(step / 1e12, 1) == 267.0
