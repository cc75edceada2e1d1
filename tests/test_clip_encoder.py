"""Wan's image encoder against transformers, on a tiny random model in each of its layouts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoder_support import all_tensors, edit, randomise, relative
from safetensors.torch import save_file
from torch import Tensor

from swifti2v.engine.errors import SpecError, WeightsError
from swifti2v.runtime.encoders import ClipVisionEncoder, clip_pixels

transformers: Any = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP vision tower in the diffusers pipeline layout; heads of 80 as in ViT-H/14."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=200,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=42,
        patch_size=14,
        hidden_act="gelu",
    )
    randomise(transformers.CLIPVisionModel(config), 0.1).save_pretrained(root / "image_encoder")
    return root


@pytest.fixture
def photo() -> Tensor:
    return torch.randint(0, 256, (30, 70, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def cubic(out: int, size: int) -> Tensor:
    """Bicubic resampling as a matrix [out, size]: Keys' kernel with a = -0.75, pixel centres, borders repeated."""
    matrix = torch.zeros(out, size, dtype=torch.float64)
    for row in range(out):
        centre = (row + 0.5) * size / out - 0.5
        first = int(centre // 1) - 1
        for tap in range(first, first + 4):
            x = abs(centre - tap)
            inner = (1.25 * x - 2.25) * x * x + 1
            outer = ((-0.75 * x + 3.75) * x - 6) * x + 3
            matrix[row, min(max(tap, 0), size - 1)] += inner if x <= 1 else outer
    return matrix


def test_clip_pixels_squash_without_crop_or_antialias(photo: Tensor):
    unit = photo.permute(2, 0, 1).double() / 255
    squashed = cubic(42, 30) @ unit @ cubic(42, 70).T
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    got = clip_pixels(photo, 42)
    assert got.shape == (1, 3, 42, 42)
    torch.testing.assert_close(got[0].double(), ((squashed - mean) / std), rtol=0, atol=1e-4)
    video = (photo.permute(2, 0, 1).float() / 255 * 2 - 1)[None, :, None]
    torch.testing.assert_close(clip_pixels(video, 42), got, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 3, 2, 8, 8),
        torch.zeros(1, 3, 8, 8),
        torch.zeros(8, 8, 3),
    ],
    ids=["channels first", "two frames", "no time", "float picture"],
)
def test_other_images_are_refused(image: Tensor):
    with pytest.raises(SpecError, match=r"want uint8 \[H, W, 3\]"):
        clip_pixels(image, 42)


def test_clip_equals_transformers(clip: Path, photo: Tensor):
    model = transformers.CLIPVisionModel.from_pretrained(clip / "image_encoder").eval()
    with torch.no_grad():
        want = model(pixel_values=clip_pixels(photo, 42), output_hidden_states=True).hidden_states[-2]
    got = ClipVisionEncoder.open(clip).encode(photo)
    assert got.shape == (1, 10, 160)
    assert relative(got, want) <= 1e-6
    half = ClipVisionEncoder.open(clip, dtype=torch.bfloat16).encode(photo)
    assert half.dtype == torch.float32
    assert relative(half, want) < 3e-2


def original_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> the names in Wan's own file, spelled out apart from the code under test."""
    state = {key.removeprefix("vision_model."): tensor for key, tensor in state.items()}
    renamed = {
        "visual.cls_embedding": state["embeddings.class_embedding"].view(1, 1, -1),
        "visual.pos_embedding": state["embeddings.position_embedding.weight"].unsqueeze(0),
        "visual.patch_embedding.weight": state["embeddings.patch_embedding.weight"],
        "visual.head": torch.ones(160, 32),
        "textual.token_embedding.weight": torch.ones(4, 4),
        "log_scale": torch.ones(()),
    }
    for kind in ("weight", "bias"):
        renamed[f"visual.pre_norm.{kind}"] = state[f"pre_layrnorm.{kind}"]
        renamed[f"visual.post_norm.{kind}"] = state[f"post_layernorm.{kind}"]
        for n in range(3):
            ours, theirs = f"visual.transformer.{n}.", f"encoder.layers.{n}."
            qkv = [state[f"{theirs}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            renamed[f"{ours}attn.to_qkv.{kind}"] = torch.cat(qkv)
            renamed[f"{ours}attn.proj.{kind}"] = state[f"{theirs}self_attn.out_proj.{kind}"]
            renamed[f"{ours}norm1.{kind}"] = state[f"{theirs}layer_norm1.{kind}"]
            renamed[f"{ours}norm2.{kind}"] = state[f"{theirs}layer_norm2.{kind}"]
            renamed[f"{ours}mlp.0.{kind}"] = state[f"{theirs}mlp.fc1.{kind}"]
            renamed[f"{ours}mlp.2.{kind}"] = state[f"{theirs}mlp.fc2.{kind}"]
    return {name: tensor.clone() for name, tensor in renamed.items()}


def original_forward(w: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The vision tower as the original layout means it: all blocks but the last, q, k, v in one projection."""
    patches = F.conv2d(pixels, w["visual.patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.cls_embedding"], patches], dim=1) + w["visual.pos_embedding"]
    x = F.layer_norm(x, (160,), w["visual.pre_norm.weight"], w["visual.pre_norm.bias"], 1e-5)
    for n in range(2):
        b = {key.removeprefix(f"visual.transformer.{n}."): tensor for key, tensor in w.items()}
        y = F.layer_norm(x, (160,), b["norm1.weight"], b["norm1.bias"], 1e-5)
        y = F.linear(y, b["attn.to_qkv.weight"], b["attn.to_qkv.bias"]).view(1, 10, 3, 2, 80)
        q, k, v = (part.transpose(1, 2) for part in y.unbind(2))  # 3 x [1, 2, 10, 80]
        y = (q @ k.transpose(2, 3) / 80**0.5).softmax(-1) @ v
        x = x + F.linear(y.transpose(1, 2).flatten(2), b["attn.proj.weight"], b["attn.proj.bias"])
        y = F.layer_norm(x, (160,), b["norm2.weight"], b["norm2.bias"], 1e-5)
        y = F.gelu(F.linear(y, b["mlp.0.weight"], b["mlp.0.bias"]))
        x = x + F.linear(y, b["mlp.2.weight"], b["mlp.2.bias"])
    return x


def test_clip_original_layout(clip: Path, photo: Tensor, tmp_path: Path):
    state = original_clip(all_tensors(clip / "image_encoder"))
    save_file(state, tmp_path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors")
    encoder = ClipVisionEncoder.open(tmp_path)
    got = encoder.encode(photo)
    assert torch.equal(got, ClipVisionEncoder.open(clip).encode(photo))
    assert relative(got, original_forward(state, clip_pixels(photo, 42))) <= 1e-5
    assert encoder.fingerprint != ClipVisionEncoder.open(clip).fingerprint
    edit(next(tmp_path.glob("*.safetensors")), lambda state: state.update({"visual.transformer.0.gate": torch.ones(1)}))
    with pytest.raises(WeightsError, match=r"got tensor visual\.transformer\.0\.gate"):
        ClipVisionEncoder.open(tmp_path)


def test_clip_saved_with_its_projection_opens_too(clip: Path, photo: Tensor, tmp_path: Path):
    config = transformers.CLIPVisionConfig.from_pretrained(clip / "image_encoder")
    model = randomise(transformers.CLIPVisionModelWithProjection(config), 0.1)
    model.save_pretrained(tmp_path / "image_encoder")
    with torch.no_grad():
        want = model(pixel_values=clip_pixels(photo, 42), output_hidden_states=True).hidden_states[-2]
    assert relative(ClipVisionEncoder.open(tmp_path).encode(photo), want) <= 1e-6
