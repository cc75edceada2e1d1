"""LoRA merging: every layout against numbers worked out by hand, PEFT's own merge, and the run-time form."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from swifti2v.engine.dit import DiT
from swifti2v.engine.errors import WeightsError
from swifti2v.engine.layouts import dit_config_json, dit_name_from_diffusers, is_rotary
from swifti2v.engine.lora import merge_loras
from swifti2v.engine.profile import DiTConfig
from swifti2v.engine.rope import half_split_order
from swifti2v.engine.weights import load_dit

CONFIG = DiTConfig(24, 48, 2, 2, 6, 4, text_dim=16, text_len=8, freq_dim=32, image_dim=20, image_tokens=5)


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights with the names and shapes of a small DiT with image attention."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) / 5 for name, p in DiT(CONFIG).state_dict().items()}


def random_lora(layers: list[str], seed: int, rank: int = 3) -> dict[str, Tensor]:
    """A LoRA in the lightx2v layout on some layers of `random_state`."""
    generator = torch.Generator().manual_seed(seed)
    state, lora = random_state(), {}
    for layer in layers:
        rows, columns = state[f"{layer}.weight"].shape
        lora[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) / 5
        lora[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) / 5
    return lora


def literal_state() -> dict[str, Tensor]:
    """One layer whose numbers can be followed in the head, and one that no test changes."""
    return {
        "blocks.0.self_attn.q.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "blocks.0.self_attn.q.bias": torch.tensor([1.0, 2.0]),
        "blocks.0.cross_attn.k_img.weight": torch.ones(2, 3),
        "blocks.0.modulation": torch.zeros(1, 6, 2),
        "patch_embedding.weight": torch.zeros(2, 3, 1, 2, 2),
    }


DOWN, UP = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[1.0], [2.0]])  # rank 1: up @ down = [[1,0,-1],[2,0,-2]]
LAYOUTS = {
    "lightx2v": ("diffusion_model.blocks.0.self_attn.q", "lora_down", "lora_up"),
    "comfyui": ("diffusion_model.blocks.0.self_attn.q", "lora_A", "lora_B"),
    "diffsynth": ("blocks.0.self_attn.q", "lora_A.default", "lora_B.default"),
    "diffsynth-pipe": ("pipe.dit.blocks.0.self_attn.q", "lora_A.default", "lora_B.default"),
    "diffusers": ("transformer.blocks.0.attn1.to_q", "lora_A", "lora_B"),
    "peft": ("base_model.model.blocks.0.attn1.to_q", "lora_A", "lora_B"),
    "peft-original": ("base_model.model.blocks.0.self_attn.q", "lora_A", "lora_B"),
    "kohya": ("lora_unet_blocks_0_self_attn_q", "lora_down", "lora_up"),
    "kohya-fun": ("lora_unet__blocks_0_self_attn_q", "lora_down", "lora_up"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_adds_the_same_delta(layout: str):
    base, down, up = LAYOUTS[layout]
    state, before = literal_state(), literal_state()
    lora = {f"{base}.{down}.weight": DOWN, f"{base}.{up}.weight": UP, f"{base}.alpha": torch.tensor(2.0)}
    merge_loras(state, [("a", lora, 0.5)])  # 0.5 * 2/1 * [[1,0,-1],[2,0,-2]]
    assert state.pop("blocks.0.self_attn.q.weight").tolist() == [[2, 2, 2], [6, 5, 4]]
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "alpha", [None, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2), torch.tensor([[2.0]])]
)
def test_alpha_is_divided_by_the_rank(alpha: Tensor | None):
    state = literal_state()
    base = "blocks.0.self_attn.q"
    lora = {f"{base}.lora_A.weight": DOWN.repeat(4, 1), f"{base}.lora_B.weight": UP.repeat(1, 4)}  # rank 4: 4 times
    if alpha is not None:
        lora[f"{base}.alpha"] = alpha
    merge_loras(state, [("a", lora, 1.0)])
    scale = 4 if alpha is None else 2
    assert state[f"{base}.weight"].tolist() == [[1 + scale, 2, 3 - scale], [4 + 2 * scale, 5, 6 - 2 * scale]]


def test_kohya_names_are_found_among_the_names_of_the_model():
    state = random_state()
    layers = ["blocks.1.cross_attn.k_img", "time_projection.1", "img_emb.proj.3", "head.head", "text_embedding.0"]
    plain = random_lora(layers, 1)
    flat = {}
    for key, tensor in plain.items():
        layer, ending = key.removeprefix("diffusion_model.").split(".lora_")
        flat[f"lora_unet_{layer.replace('.', '_')}.lora_{ending}"] = tensor
    want = random_state()
    merge_loras(want, [("plain", plain, 0.7)])
    merge_loras(state, [("flat", flat, 0.7)])
    for name, tensor in state.items():
        assert torch.equal(tensor, want[name]), name
    assert not torch.equal(
        state["blocks.1.cross_attn.k_img.weight"], random_state()["blocks.1.cross_attn.k_img.weight"]
    )


def test_a_kohya_name_that_could_be_two_layers_is_refused():
    state = {"a.b_c.weight": torch.zeros(2, 3), "a_b.c.weight": torch.zeros(2, 3)}
    lora = {"lora_unet_a_b_c.lora_down.weight": DOWN, "lora_unet_a_b_c.lora_up.weight": UP}
    with pytest.raises(WeightsError, match="2 unknown keys"):
        merge_loras(state, [("a", lora, 1.0)])


def test_lightx2v_full_differences():
    state, before = random_state(), random_state()
    generator = torch.Generator().manual_seed(3)
    names = {
        "blocks.1.self_attn.norm_q.diff": "blocks.1.self_attn.norm_q.weight",
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "blocks.0.cross_attn.norm_k_img.diff": "blocks.0.cross_attn.norm_k_img.weight",
        "blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
        "blocks.1.diff_m": "blocks.1.modulation",
        "head.diff_m": "head.modulation",
        "head.head.diff": "head.head.weight",
        "head.head.diff_b": "head.head.bias",
        "img_emb.proj.4.diff": "img_emb.proj.4.weight",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    diffs = {key: torch.randn(before[name].shape, generator=generator) for key, name in names.items()}
    lora = {f"diffusion_model.{key}": diff for key, diff in diffs.items()} | random_lora(["blocks.0.self_attn.q"], 4)
    merge_loras(state, [("a", lora, 0.25)])
    want = dict(before)
    for key, name in names.items():
        want[name] = before[name] + 0.25 * diffs[key]
    pair = [lora[f"diffusion_model.blocks.0.self_attn.q.lora_{way}.weight"] for way in ("up", "down")]
    want["blocks.0.self_attn.q.weight"] = before["blocks.0.self_attn.q.weight"] + 0.25 * pair[0] @ pair[1]
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-6, msg=name)
        assert (name in names.values() or name == "blocks.0.self_attn.q.weight") != torch.equal(tensor, before[name])


@pytest.mark.parametrize("flattened", [False, True])
def test_a_lora_on_the_patch_embedding(flattened: bool):
    state, before = random_state(), random_state()
    generator = torch.Generator().manual_seed(5)
    down, up = torch.randn(3, 6, 1, 2, 2, generator=generator), torch.randn(24, 3, 1, 1, 1, generator=generator)
    want = before["patch_embedding.weight"] + 0.5 * torch.einsum("or,rcthw->octhw", up[..., 0, 0, 0], down)
    if flattened:
        down, up = down.flatten(1), up.flatten(1)  # [3, 6, 1, 2, 2] -> [3, 24]; [24, 3, 1, 1, 1] -> [24, 3]
    lora = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    merge_loras(state, [("a", lora, 0.5)])
    torch.testing.assert_close(state["patch_embedding.weight"], want, rtol=1e-5, atol=1e-6)


def test_a_weight_in_another_memory_order_is_merged_too():
    name, state, want = "patch_embedding.weight", random_state(), random_state()
    state[name] = state[name].contiguous(memory_format=torch.channels_last_3d)
    given_tensor, given_values = state[name], state[name].clone()
    lora = {"patch_embedding.lora_A.weight": torch.ones(1, 24), "patch_embedding.lora_B.weight": torch.ones(24, 1)}
    merge_loras(state, [("a", lora, 1.0)])
    assert torch.equal(state[name], want[name] + 1)
    assert torch.equal(given_tensor, given_values)  # whoever else holds the tensor keeps it


def test_two_loras_add_and_commute():
    layers = ["blocks.0.self_attn.q", "blocks.1.ffn.2", "head.head"]
    first = ("first", random_lora(layers, 6), 0.8)
    second = ("second", random_lora(layers[1:], 7, rank=5), -0.3)
    one, other, before = random_state(), random_state(), random_state()
    merge_loras(one, [first, second])
    merge_loras(other, [second, first])
    for layer in layers:
        name, want = f"{layer}.weight", before[f"{layer}.weight"].double()
        for _, lora, strength in (first, second):
            if f"diffusion_model.{layer}.lora_up.weight" in lora:
                up, down = (lora[f"diffusion_model.{layer}.lora_{way}.weight"].double() for way in ("up", "down"))
                want = want + strength * up @ down
        torch.testing.assert_close(one[name], want.float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6)


def test_the_sum_is_rounded_once():
    """In bf16 each of these steps is lost next to 1 when rounded alone, but not their sum."""
    state = {"blocks.0.modulation": torch.ones(1, 6, 2, dtype=torch.bfloat16)}
    step = {"diffusion_model.blocks.0.diff_m": torch.full((1, 6, 2), 3 * 2.0**-10)}
    alone = dict(state)
    merge_loras(alone, [("a", step, 1.0)])
    merge_loras(state, [("a", step, 1.0), ("b", step, 1.0)])
    assert alone["blocks.0.modulation"].unique().tolist() == [1.0]
    assert state["blocks.0.modulation"].unique().tolist() == [1.0 + 2.0**-7]
    assert state["blocks.0.modulation"].dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [4, 6])
def test_a_peft_lora_merges_as_diffusers_fuses_it(alpha: int):
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=6,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        image_dim=20,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
    )
    ends = "to_q to_k to_v to_out.0 add_k_proj add_v_proj net.0.proj net.2 proj_out patch_embedding time_proj linear_1"
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=ends.split()))
    generator = torch.Generator().manual_seed(8)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    lora = {f"transformer.{key}": value for key, value in peft.get_peft_model_state_dict(model).items()}
    if alpha != 4:  # PEFT keeps alpha beside the tensors; a file that needs one says it per layer
        downs = [key for key in lora if key.endswith(".lora_A.weight")]
        lora |= {key.replace(".lora_A.weight", ".alpha"): torch.tensor(float(alpha)) for key in downs}
    state = original_names(model)
    merge_loras(state, [("peft", lora, 0.6)])
    before = original_names(model)
    model.fuse_lora(lora_scale=0.6)
    after = original_names(model)
    assert sum(not torch.equal(after[name], before[name]) for name in after) == len(lora) // (2 if alpha == 4 else 3)
    assert state.keys() == after.keys() == random_state().keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-5, atol=1e-6, msg=name)


def original_names(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a diffusers DiT without its adapters, by their original names."""
    found = {}
    for name, parameter in model.named_parameters():
        original = dit_name_from_diffusers(name.replace(".base_layer", ""))
        if ".lora_" not in name:
            assert original is not None, name
            found[original] = parameter.detach().clone()
    return found


def test_merging_equals_the_lora_applied_at_run_time(tmp_path: Path):
    """Through the loader, which permutes rows of rotary weights after the merge; the run-time form permutes its own."""
    layers = [f"blocks.{n}.{part}" for n in (0, 1) for part in ("self_attn.q", "self_attn.k", "self_attn.o", "ffn.0")]
    lora = random_lora(layers, 9)
    save_file(random_state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dit_config_json(CONFIG)))
    save_file(lora, tmp_path / "lora.safetensors")
    plain, runtime = load_dit(tmp_path / "model.safetensors"), load_dit(tmp_path / "model.safetensors")
    merged = load_dit(tmp_path / "model.safetensors", loras=[(tmp_path / "lora.safetensors", 0.9)])
    order = half_split_order(CONFIG.dim, CONFIG.heads)
    for layer in layers:
        up, down = (lora[f"diffusion_model.{layer}.lora_{way}.weight"] for way in ("up", "down"))
        up = up[order] if is_rotary(f"{layer}.weight") else up

        def add(_module: nn.Module, inputs: tuple[Tensor], output: Tensor, up: Tensor = up, down: Tensor = down):
            return output + 0.9 * (inputs[0] @ down.t()) @ up.t()

        runtime.get_submodule(layer).register_forward_hook(add)
    generator = torch.Generator().manual_seed(10)
    latents, text, image = (torch.randn(s, generator=generator) for s in ((1, 6, 3, 4, 6), (1, 8, 16), (1, 5, 20)))
    times = torch.tensor([[0.0, 700.0, 700.0]])
    with torch.no_grad():
        got, want, without = (model.denoise(latents, times, text, image) for model in (merged, runtime, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (without - want).abs().max() > 1e-2


Q = "blocks.0.self_attn.q"
PAIR = {f"{Q}.lora_down.weight": DOWN, f"{Q}.lora_up.weight": UP}
REFUSALS = {
    "empty": ({}, "got no tensors"),
    "unknown layer": (PAIR | {"blocks.9.self_attn.q.diff": DOWN}, r"1 unknown keys \('blocks.9.self_attn.q.diff'\)"),
    "unknown ending": (PAIR | {f"{Q}.lora_left.weight": DOWN}, "unknown keys"),
    "no ending": (PAIR | {f"{Q}.weight": torch.ones(2, 3)}, "unknown keys"),
    "unknown kohya layer": (
        {f"lora_unet_{part}": t for part, t in PAIR.items()} | {"lora_unet_x.alpha": UP},
        "unknown",
    ),
    "text encoder": (PAIR | {"lora_te_text_model_q.lora_down.weight": DOWN}, "unknown keys"),
    "image attention": (PAIR | {"transformer.blocks.0.attn2.add_v_proj.lora_A.weight": DOWN}, "add_v_proj"),
    "many": ({f"x{i}": UP for i in range(7)}, r"7 unknown keys \('x0', 'x1', 'x2', 'x3', 'x4', ...\)"),
    "line break": ({"a\nb": UP}, r"'a\\nb'"),
    "twice": (PAIR | {f"diffusion_model.{Q}.lora_A.weight": DOWN}, "1 keys that repeat"),
    "other expert": (PAIR | {"transformer_2.blocks.0.attn1.to_q.lora_A.weight": DOWN}, "low-noise expert"),
    "DoRA": (PAIR | {f"{Q}.dora_scale": UP}, "DoRA"),
    "PEFT DoRA": (PAIR | {f"{Q}.lora_magnitude_vector": UP}, "DoRA"),
    "LoHa": ({f"{Q}.hada_w1_a": UP}, "LoHa"),
    "LoKr": ({f"{Q}.lokr_w1": UP}, "LoKr"),
    "LoCon": (PAIR | {f"{Q}.lora_mid.weight": UP}, "LoCon"),
    "no up": ({f"{Q}.lora_down.weight": DOWN}, f"1 incomplete changes .'{Q}.weight with down'"),
    "no down": ({f"{Q}.lora_up.weight": UP}, "1 incomplete changes"),
    "lone alpha": ({f"{Q}.diff": torch.ones(2, 3), f"{Q}.alpha": torch.tensor(1.0)}, "1 incomplete changes"),
    "wrong width": (PAIR | {f"{Q}.lora_down.weight": torch.ones(1, 4)}, r"\[2, 3\] with down \[1, 4\], up \[2, 1\]"),
    "wrong height": (PAIR | {f"{Q}.lora_up.weight": torch.ones(3, 1)}, "1 changes of another shape"),
    "wrong rank": (PAIR | {f"{Q}.lora_up.weight": torch.ones(2, 2)}, "1 changes of another shape"),
    "up with a kernel": (PAIR | {f"{Q}.lora_up.weight": torch.ones(2, 1, 2)}, "1 changes of another shape"),
    "rank 0": ({f"{Q}.lora_down.weight": DOWN[:0], f"{Q}.lora_up.weight": UP[:, :0]}, "another shape"),
    "vectors": ({f"{Q}.lora_down.weight": DOWN[0], f"{Q}.lora_up.weight": UP[:, 0]}, "another shape"),
    "scalar": (PAIR | {f"{Q}.lora_down.weight": torch.tensor(1.0)}, "another shape"),
    "wrong diff": ({f"{Q}.diff_b": torch.ones(3)}, "another shape"),
    "diff that would broadcast": ({f"{Q}.diff_b": torch.ones(1)}, "another shape"),
    "wrong modulation": ({"blocks.0.diff_m": torch.ones(6, 2)}, "another shape"),
    "wrong kernel": (
        {"patch_embedding.lora_down.weight": torch.ones(1, 3, 2, 2, 1), "patch_embedding.lora_up.weight": UP},
        "another shape",
    ),
    "many alphas": (PAIR | {f"{Q}.alpha": torch.ones(2)}, "another shape"),
    "nan": (PAIR | {f"{Q}.diff_b": torch.tensor([1.0, float("nan")])}, "1 tensors with values that are not finite"),
    "infinite alpha": (PAIR | {f"{Q}.alpha": torch.tensor(float("inf"))}, "not finite"),
    "fp8": (PAIR | {f"{Q}.lora_up.weight": UP.to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
    "integers": (PAIR | {f"{Q}.lora_up.weight": UP.to(torch.int8)}, "foreign dtype"),
    "complex alpha": (PAIR | {f"{Q}.alpha": torch.tensor(1j)}, "foreign dtype"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_what_is_wrong_and_change_nothing(case: str):
    lora, match = REFUSALS[case]
    state = literal_state()
    if case == "image attention":
        del state["blocks.0.cross_attn.k_img.weight"]
    before, values = dict(state), {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(WeightsError, match=match) as caught:
        merge_loras(state, [("good", PAIR, 1.0), ("bad.safetensors", lora, 1.0)])  # the first alone would be merged
    text = str(caught.value)
    assert text.startswith("LoRA 'bad.safetensors': got ")
    assert ", want " in text
    assert "; " in text.split(", want ")[1]
    assert "\n" not in text
    assert state.keys() == before.keys()
    assert all(state[name] is before[name] and torch.equal(state[name], values[name]) for name in state)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_not_finite_is_refused(strength: float):
    with pytest.raises(WeightsError, match=f"got strength {strength}, want a finite number"):
        merge_loras(literal_state(), [("a", PAIR, strength)])


def test_quantised_weights_are_refused():
    state = literal_state()
    state[f"{Q}.weight"] = state[f"{Q}.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(WeightsError, match=r"self_attn.q.weight torch.float8_e4m3fn.*then quantise"):
        merge_loras(state, [("a", PAIR, 1.0)])


def test_no_lora_changes_nothing():
    state = literal_state()
    merge_loras(state, [])
    assert all(torch.equal(tensor, literal_state()[name]) for name, tensor in state.items())


WORDS = [
    "blocks",
    "0",
    "self_attn",
    "attn1",
    "q",
    "to_q",
    "weight",
    "lora_down",
    "lora_up",
    "lora_A",
    "lora_B",
    "default",
]
WORDS += ["transformer", "diffusion_model", "base_model", "model", "lora_unet_", "lora_unet_blocks_0_self_attn_q"]
WORDS += ["alpha", "diff", "diff_b", "diff_m", "norm2", "head", "hada_"]
PIECES = st.one_of(st.sampled_from(WORDS), st.text(max_size=4))
KEYS = st.one_of(st.text(max_size=30), st.lists(PIECES, max_size=6).map(".".join))
MISFITS = st.sampled_from([torch.ones(7, 7), torch.ones(7), torch.tensor(1.0), torch.zeros(0)])  # fit no layer


@settings(max_examples=300)
@given(st.dictionaries(KEYS, MISFITS, max_size=4))
def test_garbage_names_are_refused_and_never_crash(lora: dict[str, Tensor]):
    with pytest.raises(WeightsError) as caught:
        merge_loras(literal_state(), [("garbage", lora, 1.0)])
    assert len(str(caught.value).splitlines()) == 1


LAYERS = ["blocks.0.self_attn.q", "transformer.blocks.0.attn1.to_q", "patch_embedding", "lora_unet_patch_embedding"]
ENDS = ["lora_down.weight", "lora_A.weight", "lora_up.weight", "lora_B.default.weight", "alpha", "diff", "diff_b"]
NAMES = st.builds("{}.{}".format, st.sampled_from(LAYERS), st.sampled_from(ENDS))
SHAPES = st.sampled_from([(), (1,), (2,), (2, 3), (1, 3), (2, 1), (0, 3), (2, 1, 1, 1, 1), (1, 3, 1, 2, 2), (1, 12)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool])


@settings(max_examples=300)
@given(st.dictionaries(NAMES, st.builds(lambda s, d: torch.ones(s).to(d), SHAPES, DTYPES), max_size=4))
def test_real_names_with_any_tensors_merge_or_are_refused(lora: dict[str, Tensor]):
    state, before = literal_state(), literal_state()
    try:
        merge_loras(state, [("any", lora, 1.0)])
    except WeightsError:
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
