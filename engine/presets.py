"""The profiles that have a name. Model sizes are those of the public Wan configurations."""

from dataclasses import replace

from .errors import ProfileError
from .profile import DiTConfig, Profile, StageConfig, TextConfig, VAEConfig

# The prompt that Wan's own pipelines steer away from when guidance is on.
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

# Per-channel mean and deviation of the latents of the two public VAEs.
WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
)  # fmt: skip
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

WAN21_I2V_14B = DiTConfig(dim=5120, ffn_dim=13824, heads=40, layers=40, in_channels=36, out_channels=16, image_dim=1280)
WAN22_I2V_A14B = replace(WAN21_I2V_14B, image_dim=0)  # each of the two experts
WAN22_TI2V_5B = DiTConfig(dim=3072, ffn_dim=14336, heads=24, layers=30, in_channels=48, out_channels=48)
SWIFTI2V_STAGE2 = replace(WAN22_TI2V_5B, in_channels=96)

WAN21_VAE = VAEConfig(16, encoder_dim=96, decoder_dim=96, mean=WAN21_MEAN, std=WAN21_STD)
WAN22_VAE = VAEConfig(48, encoder_dim=160, decoder_dim=256, mean=WAN22_MEAN, std=WAN22_STD, patch=2, residual=True)

A14B_BOUNDARY = 0.9


def _plain(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (0.0,) * channels, (1.0,) * channels


def _small_vae(channels: int, encoder_dim: int, decoder_dim: int, *, wan22: bool) -> VAEConfig:
    mean, std = _plain(channels)
    return VAEConfig(channels, encoder_dim, decoder_dim, mean, std, patch=2 if wan22 else 1, residual=wan22)


def _small_dit(dim: int, layers: int, heads: int, channels: tuple[int, int], text: tuple[int, int]) -> DiTConfig:
    return DiTConfig(
        dim, 4 * dim, heads, layers, channels[0], channels[1], text_dim=text[0], text_len=text[1], freq_dim=64
    )


def _wan(name: str, frames: int) -> Profile:
    return Profile(
        name=name,
        frames=frames,
        stage1=StageConfig(640, 352, WAN21_I2V_14B, WAN21_VAE),
        stage2=StageConfig(2560, 1408, SWIFTI2V_STAGE2, WAN22_VAE),
        text=TextConfig("umt5", 256384, WAN_NEGATIVE),
    )


def _nano() -> Profile:
    text = (128, 32)
    # Small cells of many channels: what a VAE loses, or a small DiT cannot move, no later step brings back.
    mean, std = _plain(48)
    vae = VAEConfig(48, 16, 16, mean, std, (1, 4, 4), res_blocks=1, temporal=(True, True), residual=True)
    return Profile(
        name="nano",
        frames=33,
        fps=8,
        stage1=StageConfig(64, 40, _small_dit(256, 5, 4, (100, 48), text), vae),
        stage2=StageConfig(256, 160, _small_dit(256, 5, 4, (96, 48), text), vae, shift=3.0),
        text=TextConfig("words", 4096),
    )


def _tiny(name: str) -> Profile:
    text = (16, 8)
    return Profile(
        name=name,
        frames=33,
        fps=8,
        stage1=StageConfig(48, 32, _small_dit(24, 2, 2, (12, 4), text), _small_vae(4, 4, 4, wan22=False)),
        stage2=StageConfig(192, 128, _small_dit(24, 2, 2, (12, 6), text), _small_vae(6, 4, 4, wan22=True)),
        text=TextConfig("words", 64),
    )


PROFILES = {
    "wan-2k": lambda: _wan("wan-2k", 81),
    "wan-2k-161": lambda: _wan("wan-2k-161", 161),
    "wan-2k-241": lambda: _wan("wan-2k-241", 241),
    "nano": _nano,
    "tiny": lambda: _tiny("tiny"),
}


def get_profile(name: str) -> Profile:
    """The profile of that name."""
    if name not in PROFILES:
        raise ProfileError(f"profile: got {name!r}, want one of {', '.join(PROFILES)}; pick one")
    return PROFILES[name]()
