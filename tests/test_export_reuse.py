"""Graphs that are not built again: the fields of a key, LoRAs that leave most alone, bundles to take from."""

import io
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from bundles import change, command, flip, refused
from rich.console import Console
from safetensors.torch import save_file

from swifti2v.engine.errors import BundleError
from swifti2v.engine.graphs import profile_graphs
from swifti2v.engine.manifest import Bundle, check_artifacts, read_bundle
from swifti2v.engine.presets import get_profile
from swifti2v.engine.profile import Profile
from swifti2v.export.build import BuildProgress, build_bundle
from swifti2v.export.keys import MODEL_CODE, GraphKey, graph_keys
from swifti2v.export.parity import sample_feed
from swifti2v.export.reads import read_names
from swifti2v.export.target import Target, make_target
from swifti2v.runtime.backend_registry import versions_here
from swifti2v.runtime.backend_weights import Source, open_source
from swifti2v.runtime.bundle import find_bundle, load_bundle
from swifti2v.runtime.cli_bundle import default_bundle
from swifti2v.runtime.model_paths import ModelPaths, find_models

CPU = torch.device("cpu")
SMALL = ["stage1_time", "stage1_text", "stage2_time", "stage2_text"]


@pytest.fixture
def source(tiny: Profile) -> Source:
    return open_source(tiny)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, save_models) -> tuple[Path, Bundle]:
    """A model folder, and a bundle of it."""
    tiny, folder = get_profile("tiny"), tmp_path_factory.mktemp("trained")
    models = save_models(tiny, folder / "models")
    return models, build_bundle(open_source(tiny, models), "eager", folder / "cache" / "bundles" / "tiny-base")


def built(source: Source, out: Path, names: list[str] | None = None, reuse: tuple[Path, ...] = ()) -> set[str]:
    """Build, and name the graphs that were not there already."""
    seen: list[BuildProgress] = []
    build_bundle(source, "eager", out, names, seen.append, reuse=reuse)
    return {progress.name for progress in seen if progress.record is not None and not progress.kept}


def write_lora(path: Path, layer: str) -> Path:
    dim, generator = get_profile("tiny").stage2.dit.dim, torch.Generator().manual_seed(0)
    ends = {"lora_down": (2, dim), "lora_up": (dim, 2)}
    save_file(
        {
            f"diffusion_model.{layer}.{end}.weight": torch.randn(*size, generator=generator)
            for end, size in ends.items()
        },
        path,
    )
    return path


def test_a_key_is_an_explicit_list_of_fields(source: Source):
    names = ["weights", "graph", "code", "backend", "compiler", "arch", "precision"]
    assert [field.name for field in fields(GraphKey)] == names
    assert [field.name for field in fields(Target)] == ["backend", "arch", "versions", "built_with"], "all in the key"
    graphs = {name: graph for name, graph in profile_graphs(source.profile, torch.float32).items() if name in SMALL}
    target = make_target(source, "eager")
    key = graph_keys(graphs, source, target)["stage2_time"]
    others = [replace(key, **{name: "another"}) for name in names if name != "compiler"]
    others.append(replace(key, compiler={**key.compiler, "nvcc": "13.0"}))
    assert len({one.digest for one in (key, *others)}) == len(names) + 1

    def changed(**changes: object) -> GraphKey:
        return graph_keys(graphs, source, replace(target, **changes))["stage2_time"]

    assert changed(arch="sm89") == replace(key, arch="sm89")
    assert changed(built_with={"onnx": "1"}).compiler == {**key.compiler, "onnx": "1"}
    assert changed(versions={**target.versions, MODEL_CODE: "0"}) == replace(
        key, code=changed(versions={**target.versions, MODEL_CODE: "0"}).code
    )
    assert changed(versions={**target.versions, MODEL_CODE: "0"}).code != key.code


def test_a_graph_reads_what_its_key_says_and_nothing_else(tiny: Profile):
    """Whatever the key leaves out may be anything: here no number at all."""
    for name, graph in profile_graphs(tiny, torch.float32).items():
        module = open_source(tiny).modules[graph.weights]
        read = read_names(tiny, torch.float32)[name]
        for parameter, tensor in module.named_parameters():
            if parameter not in read:
                tensor.fill_(float("nan"))
        feed = sample_feed(graph.spec)
        with torch.inference_mode():
            outputs = graph.build(module, False)(*(feed[tensor.name] for tensor in graph.spec.inputs))
        assert all(output.isfinite().all() for output in outputs), name


@pytest.mark.parametrize(
    ("layer", "graphs"),
    [("blocks.0.self_attn.q", {"stage2_first", "stage2_next"}), ("blocks.1.cross_attn.k", {"stage2_text"})],
)
def test_a_lora_rebuilds_the_graphs_that_read_what_it_changes(
    tiny: Profile, trained: tuple[Path, Bundle], tmp_path: Path, layer: str, graphs: set[str]
):
    models, base = trained
    lora = write_lora(tmp_path / "l.safetensors", layer)
    merged = open_source(tiny, models, single=ModelPaths(loras={"stage2": ((lora, 0.5),)}))
    assert built(merged, tmp_path / "b", reuse=(base.folder,)) == graphs
    bundle = read_bundle(tmp_path / "b")
    check_artifacts(bundle)
    was, now = base.manifest.weights.sha256, bundle.manifest.weights.sha256
    assert [name for name in now if now[name] != was[name]] == ["stage2"]
    linked = {name for name in now_graphs(bundle) if bundle.files(name)[0].samefile(base.files(name)[0])}
    assert linked == now_graphs(bundle) - graphs, "one copy on the disk"
    assert built(merged, tmp_path / "alone") == now_graphs(bundle)
    assert read_bundle(tmp_path / "alone").manifest.digest == bundle.manifest.digest
    stronger = open_source(tiny, models, single=ModelPaths(loras={"stage2": ((lora, 1.0),)}))
    assert built(stronger, tmp_path / "b") == graphs
    none = open_source(tiny, models, single=ModelPaths(loras={"stage2": ((lora, 0.0),)}))
    assert built(none, tmp_path / "b", reuse=(base.folder,)) == set()


def now_graphs(bundle: Bundle) -> set[str]:
    return set(bundle.manifest.graphs)


def test_a_run_with_a_lora_takes_the_bundle_with_it_or_none(
    tiny: Profile, trained: tuple[Path, Bundle], tmp_path: Path
):
    models, base = trained
    cache = base.folder.parent.parent
    lora = write_lora(tmp_path / "l.safetensors", "blocks.0.self_attn.q")
    option = ("--model-dir", models, "--lora", f"stage2={lora}@0.5")
    plain, merged = find_models(tiny, models), find_models(tiny, models, ModelPaths(loras={"stage2": ((lora, 0.5),)}))
    assert find_bundle(cache, tiny, plain, CPU) == (base.folder, "")
    assert find_bundle(cache, tiny, merged, CPU) == (None, "")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWIFTI2V_CACHE", str(cache))
        assert default_bundle(tiny, merged, CPU, "fp32", Console(file=said, soft_wrap=True)) is None
    assert f"--weights DIR --backend onnxruntime --precision fp32 --lora stage2={lora}@0.5 compiles" in said.getvalue()
    refused(lambda: load_bundle(base.folder, paths=merged), "weights of stage2", kind=BundleError)

    line = ("--profile", "tiny", "--backend", "eager", "--precision", "fp32", *option)
    ran = command("swifti2v-export", *line, cache=cache)
    assert ran.returncode == 0, ran.stderr
    assert "stage2_next: built in" in ran.stderr
    assert ran.stderr.count(": built in") == 2, "the others are in the cache"
    made = Path(ran.stdout.strip())
    assert find_bundle(cache, tiny, merged, CPU) == (made, "")
    assert find_bundle(cache, tiny, plain, CPU) == (base.folder, "")
    assert load_bundle(made, paths=merged).bundle == read_bundle(made)
    refused(lambda: load_bundle(made, paths=plain), "weights of stage2", kind=BundleError)
    other = find_models(tiny, models, ModelPaths(loras={"stage2": ((lora, 0.6),)}))
    refused(lambda: load_bundle(made, paths=other), "weights of stage2", kind=BundleError)
    assert command("swifti2v-export", "verify", made, *option, "--json", cache=cache).returncode == 0
    assert command("swifti2v-export", "verify", made, "--weights", models, cache=cache).returncode == 1


def test_what_repairs_a_bundle_of_given_weights_asks_for_loras_again(
    tiny: Profile, trained: tuple[Path, Bundle], tmp_path: Path
):
    """It may have some: a bundle has their hashes, and neither paths nor strengths."""
    models, base = trained
    paths, folder = find_models(tiny, models), shutil.copytree(base.folder, tmp_path / "b")
    change(folder, versions={**base.manifest.versions, "torch": "2.0.0"})
    text = refused(lambda: load_bundle(folder, paths=paths), "torch: got a bundle built with 2.0.0")
    assert text.endswith(
        f"--weights DIR --backend eager --precision fp32 -o {folder} with your --weights and --lora options"
    )
    lora = write_lora(tmp_path / "l.safetensors", "blocks.0.self_attn.q")
    merged = replace(paths, loras={"stage2": ((lora, 0.5),)})
    refused(
        lambda: load_bundle(base.folder, paths=merged), "use the weights and LoRAs it was built from, or run", "--lora"
    )


def test_a_lora_is_not_passed_over_where_a_bundle_needs_no_weights(trained: tuple[Path, Bundle], tmp_path: Path):
    models, base = trained
    folder = shutil.copytree(base.folder, tmp_path / "b")
    change(folder, backend="onnxruntime", versions=versions_here("onnxruntime"))  # what runs without modules
    words = ModelPaths(text=models / "text")
    assert load_bundle(folder, paths=words).modules == {}
    lora = write_lora(tmp_path / "l.safetensors", "blocks.0.self_attn.q")
    merged = replace(words, loras={"stage2": ((lora, 0.5),)})
    refused(lambda: load_bundle(folder, paths=merged), "LoRAs for", "--model-dir", kind=BundleError)


def test_what_is_damaged_or_gone_is_not_taken(source: Source, tmp_path: Path):
    base = build_bundle(source, "eager", tmp_path / "base", SMALL)
    flip(base.files("stage1_text")[0], 40)
    base.files("stage2_text")[0].unlink()
    elsewhere = tmp_path / "elsewhere.json"
    base.files("stage2_time")[0].rename(elsewhere)
    base.files("stage2_time")[0].symlink_to(elsewhere)
    assert built(source, tmp_path / "b", SMALL, (tmp_path / "nowhere", base.folder)) == set(SMALL) - {"stage1_time"}
    check_artifacts(read_bundle(tmp_path / "b"))
    assert built(source, tmp_path / "c", ["stage1_text"], (base.folder, tmp_path / "b")) == set(), (
        "the next that is whole"
    )
    assert list(read_bundle(tmp_path / "c").manifest.graphs) == ["stage1_text"], "what was asked for, not all there is"


def test_the_command_takes_graphs_from_a_bundle(source: Source, tmp_path: Path):
    base = build_bundle(source, "eager", tmp_path / "base", SMALL)
    line = ["--profile", "tiny", "--backend", "eager", "--precision", "fp32", "--graphs", ",".join(SMALL), "-o"]
    ran = command("swifti2v-export", *line, tmp_path / "b", "--reuse", base.folder, "--json", cache=tmp_path / "cache")
    assert ran.returncode == 0, ran.stderr
    assert '"seconds": {}' in ran.stdout
    wrong = command("swifti2v-export", *line, tmp_path / "c", "--reuse", "nowhere", cache=tmp_path / "cache")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1), wrong.stderr
    both = ["--weights", tmp_path, "--model-dir", tmp_path]
    wrong = command("swifti2v-export", *line, tmp_path / "c", *both, cache=tmp_path / "cache")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1), wrong.stderr
    lora = ["--lora", f"stage2={write_lora(tmp_path / 'l.safetensors', 'blocks.0.self_attn.q')}"]
    wrong = command("swifti2v-export", *line, tmp_path / "c", *lora, cache=tmp_path / "cache")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1), wrong.stderr
    assert "untrained" in wrong.stderr
    assert not (tmp_path / "c").exists()


BUILDER = """
import sys
from pathlib import Path
from swifti2v import get_profile
from swifti2v.engine.errors import BundleError
from swifti2v.engine.manifest import check_artifacts
from swifti2v.export.build import build_bundle
from swifti2v.runtime.backend_weights import open_source
folder, me, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
one, other = open_source(get_profile("tiny")), open_source(get_profile("tiny"))
other.modules["stage2"].get_parameter("text_embedding.0.weight").data.mul_(1.5)
(folder / f"ready-{me}").touch()
while not (folder / f"ready-{1 - me}").exists():
    pass
done = 0
for turn in range(30):
    out, source = folder / "ab"[turn // 2 % 2], (one, other)[(turn + me) % 2]
    try:
        build_bundle(source, "eager", out, names, reuse=(folder / "a", folder / "b"))
        done += 1
    except BundleError as error:
        assert "another build" in str(error), error
print(done)
"""


def test_two_processes_build_into_one_cache(tmp_path: Path):
    """They take from the bundles that the other one replaces, and often want the same place."""
    line = [sys.executable, "-c", BUILDER, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*line, me, ",".join(SMALL[2:])], stdout=subprocess.PIPE, text=True, env=environment)
        for me in ("0", "1")
    ]
    ended = [(process.communicate()[0], process.returncode) for process in running]
    assert all(code == 0 and int(text) >= 5 for text, code in ended), ended
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("ready"))
    assert left == ["a", "b"]
    for name in left:
        bundle = read_bundle(tmp_path / name)
        assert set(bundle.manifest.graphs) == set(SMALL[2:])
        check_artifacts(bundle)
