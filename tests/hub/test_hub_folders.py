"""Folders in and out: slices, heads, names, files that go along, and a run between."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lepton_jax as lepton
from lepton_jax import adapt
from lepton_jax.cli import main
from lepton_jax.hub import reading
from lepton_jax.hub.families import FAMILIES, canonical, family_for
from lepton_jax.hub.shards import Shards
from lepton_jax.models import DecoderLM, DecoderShape, TransformerLM
from lepton_jax.trees import by_path
from tools.hub import checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")

LLAMA = {"scaling": "llama3", "schema": "rope_parameters", "head_dim": 12, "groups": 2}
GPT_2 = {name: values[-1] for name, values in checkpoints.AXES["gpt2"].items()}
COMPANIONS = {
    "tokenizer.json": b'{"model": "\xc3\xa9"}\r\n',
    "tokenizer.model": bytes(range(256)),
    "tokenizer_config.json": b'{"chat_template": "{{ x }}" }',
    "chat_template.jinja": b"{% for m in messages %}{{ m }}\n{% endfor %}",
    "generation_config.json": b"{}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "LICENSE": b"for all",
}


def data() -> Path:
    folders = [parent / "shared" / "data" for parent in Path(__file__).parents]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


STORIES = data() / "weights_stories260k"
has_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/data")


@nnx.jit
def run(model, tokens, **more):
    return model(tokens, **more)


def made(folder, family="llama", flags=LLAMA, **more):
    checkpoints.write(checkpoints.Case(family, flags, **more), folder)
    return folder


def contents(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                values = file.get_tensor(name)
                tensors[name] = (values.dtype.name, values.shape, values.tobytes())
    return tensors


# ---- there and back ----


@pytest.mark.parametrize(
    ("tied", "dtype"), [*zip(checkpoints.TIED, checkpoints.DTYPES, strict=True)]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_comes_in_goes_out_to_the_bit(tmp_path, family, tied, dtype):
    flags = {"llama": LLAMA, "gpt2": GPT_2 | {"buffers": False}}[family]
    folder = made(tmp_path / "in", family, flags, tied=tied, dtype=dtype)
    for name, content in COMPANIONS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    opened = lepton.hub.open(folder)
    out = lepton.hub.save(opened.module(), tmp_path / "out", like=opened)
    assert contents(out) == contents(folder)
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text())
    for name, content in COMPANIONS.items():
        assert (out / name).read_bytes() == content


@pytest.mark.parametrize("family", checkpoints.AXES)
def test_a_configuration_of_our_own_says_the_same(tmp_path, family):
    for number, case in enumerate(checkpoints.covering(family)):
        folder = tmp_path / str(number)
        checkpoints.write(case, folder)
        shape = lepton.hub.open(folder).shape
        chosen = family_for(shape)
        again = chosen.shape_of(chosen.config_of(shape, 77), "")
        assert canonical(again) == canonical(shape)
        assert FAMILIES[family].holds(shape)


def test_a_model_of_the_zoo_is_a_llama(tmp_path):
    model = TransformerLM(
        40, dim=16, layers=2, heads=4, kv_heads=2, loop="scan", rngs=nnx.Rngs(0)
    )
    folder = lepton.hub.open(lepton.hub.save(model, tmp_path / "out"))
    assert folder.family.name == "llama"
    tokens = jnp.arange(24).reshape(2, 12)
    right = run(model, tokens)
    np.testing.assert_allclose(run(folder.module(), tokens), right, atol=2e-5)


def test_a_model_that_no_family_can_hold_is_refused(tmp_path):
    shape = DecoderShape(8, dim=8, layers=1, heads=2, hidden=8, post_norms=True)
    model = DecoderLM(shape, rngs=nnx.Rngs(0))
    with pytest.raises(lepton.ModelError, match="no family of published models"):
        lepton.hub.save(model, tmp_path / "out")
    with pytest.raises(lepton.ModelError, match="has no place among"):
        lepton.hub.save(lepton.models.MLP((2, 2), rngs=nnx.Rngs(0)), tmp_path / "out")


def test_large_models_are_written_as_several_files_that_the_index_names(tmp_path):
    opened = lepton.hub.open(made(tmp_path / "in"))
    out = lepton.hub.save(
        opened.module(), tmp_path / "out", like=opened, shard_bytes=20_000
    )
    files = sorted(path.name for path in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert contents(out) == contents(tmp_path / "in")
    sizes = [len(values) for _, _, values in contents(out).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert lepton.hub.open(out).shape == opened.shape


def test_a_dtype_that_is_asked_for_is_rounded_to(tmp_path):
    opened = lepton.hub.open(made(tmp_path / "in"))
    out = lepton.hub.save(
        opened.module(), tmp_path / "out", like=opened, dtype="bfloat16"
    )
    name = "model.norm.weight"
    kept = load_file(out / "model.safetensors")[name]
    came = load_file(tmp_path / "in" / "model.safetensors")[name]
    assert np.array_equal(kept, came.astype(kept.dtype)) and kept.dtype == "bfloat16"
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(lepton.SettingError, match="dtype is 'int4'"):
        lepton.hub.save(opened.module(), tmp_path / "more", dtype="int4")


def test_weights_that_are_too_large_for_a_dtype_are_not_written_as_infinity(tmp_path):
    folder = made(tmp_path / "in", dtype="F16")
    opened = lepton.hub.open(folder)
    module = opened.module()
    module.norm.scale[...] = module.norm.scale[...].at[3].set(1e5)
    with pytest.raises(lepton.CheckpointError, match=r"up to 1e\+05, too large for"):
        lepton.hub.save(module, tmp_path / "out", like=opened)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    lepton.hub.save(module, tmp_path / "out", like=opened, dtype="bfloat16")


def test_a_module_computes_in_the_dtype_that_it_is_read_in(tmp_path):
    module = lepton.hub.open(made(tmp_path)).module(jnp.bfloat16)
    assert module(jnp.zeros((1, 3), jnp.int32)).dtype == jnp.bfloat16


def test_nothing_is_written_over(tmp_path):
    opened = lepton.hub.open(made(tmp_path / "in"))
    with pytest.raises(lepton.CheckpointError, match="not empty"):
        lepton.hub.save(opened.module(), tmp_path / "in")


# ---- heads ----


def test_a_head_is_tied_as_flag_and_tensors_say(tmp_path):
    for tied in checkpoints.TIED:
        folder = lepton.hub.open(made(tmp_path / tied, tied=tied))
        assert folder.shape.tied == (tied != "untied")


def test_a_flag_without_its_tensor_names_both(tmp_path):
    folder = made(tmp_path / "in", tied="tied")
    say(folder, tie_word_embeddings=None)  # false, in this family
    with pytest.raises(lepton.CheckpointError) as raised:
        lepton.hub.open(folder)
    for word in ("tie_word_embeddings is false", "lm_head.weight", "tied=True"):
        assert word in str(raised.value)
    opened = lepton.hub.open(folder, tied=True)
    assert opened.shape.tied
    out = lepton.hub.save(opened.module(), tmp_path / "out", like=opened)
    assert lepton.hub.open(out).shape.tied


def test_a_flag_against_another_tensor_names_both(tmp_path):
    folder = made(tmp_path)
    say(folder, tie_word_embeddings=True)
    with pytest.raises(lepton.CheckpointError) as raised:
        lepton.hub.open(folder)
    for word in ("lm_head.weight differs", "embed_tokens", "tied=False"):
        assert word in str(raised.value)
    assert not lepton.hub.open(folder, tied=False).shape.tied
    assert lepton.hub.open(folder, tied=True).shape.tied


def say(folder, **keys):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | keys
    path.write_text(json.dumps(content))


# ---- slices ----


@pytest.mark.parametrize("loop", ["unrolled", "scan"])
def test_each_device_reads_its_own_slice_alone(tmp_path, loop):
    """Two devices of eight hold an eighth of each matrix, and read no more."""
    folder = lepton.hub.open(made(tmp_path, tied="tied"), loop=loop)
    devices = np.asarray(jax.devices()[:8])
    mesh = jax.sharding.Mesh(devices, ("fsdp",))
    model = nnx.eval_shape(lambda: folder.model(rngs=nnx.Rngs(0)))
    params = by_path(nnx.to_pure_dict(nnx.state(model)))
    matrices = {path: leaf for path, leaf in params.items() if leaf.ndim > 1}

    def wanted(leaf):
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp")
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    kept = {path: wanted(leaf) for path, leaf in matrices.items() if "norm" not in path}
    found = folder._sources_of(params)
    sizes = sum(leaf.size * 4 for leaf in kept.values())
    with Shards(tmp_path) as shards:
        arrays = reading.read(shards, kept, found)
        assert shards.bytes_read == sizes
    with Shards(tmp_path) as shards:
        for path, leaf in kept.items():
            index = leaf.sharding.devices_indices_map(leaf.shape)[devices[3]]
            part = reading.part_of(shards, found[path], leaf.shape, index)
            own = arrays[path].addressable_shards[3].data
            assert np.array_equal(part, own)
        assert shards.bytes_read == sizes // 8


def test_a_stack_of_layers_computes_what_the_layers_do(tmp_path):
    flags = {"scaling": "default", "schema": "type", "head_dim": 8}
    flags |= {"scalar": 8, "attention_cap": 1.5, "logit_cap": None}
    folder = made(tmp_path, "gemma2", flags | {"windows": "by default"})
    tokens = jnp.asarray(checkpoints.tokens_of())[None]
    right = run(lepton.hub.open(folder).module(), tokens)
    scanned = lepton.hub.open(folder, loop="scan").module()
    np.testing.assert_allclose(run(scanned, tokens), right, atol=2e-5)
    out = tmp_path / "out"
    assert contents(lepton.hub.save(scanned, out, like=folder)) == contents(folder)


# ---- a run ----


def test_a_run_begins_with_the_weights_and_leaves_a_folder(tmp_path):
    folder = lepton.hub.open(made(tmp_path / "in", dtype="BF16"))
    tokens = np.stack([checkpoints.tokens_of(seed) for seed in range(16)])
    trainer = lepton.Trainer(
        model=folder.model,
        loss=lepton.losses.cross_entropy,
        optimizer=partial(optax.adamw, weight_decay=0.0),
        learning_rate=1e-2,
        train=(tokens[:, :-1], tokens[:, 1:]),
        batch_size=8,
        devices=2,
    )
    folder.load_into(trainer)
    before = lepton.hub.save(trainer, tmp_path / "before", like=folder)
    assert contents(before) == contents(folder.path)
    losses = trainer.fit(steps=6)["loss"]
    assert trainer.step == 6 and losses[-1] < losses[0]

    after = lepton.hub.save(trainer, tmp_path / "after", like=folder, dtype="float32")
    right = run(trainer.module(), tokens[:2])
    again = lepton.hub.open(after)
    np.testing.assert_allclose(run(again.module(), tokens[:2]), right, atol=1e-4)
    again.load_into(trainer)
    assert trainer.step == 0
    assert not any(map(np.any, jax.tree.leaves(trainer.state.optimizer)))


def test_adapters_begin_next_to_the_weights_and_are_merged_into_them(tmp_path):
    folder = lepton.hub.open(made(tmp_path / "in", dtype="F32"))
    tokens = np.stack([checkpoints.tokens_of(seed) for seed in range(2)])
    trainer = lepton.Trainer(
        model=adapt.lora(folder.model, rank=2, targets="query"),
        loss=lepton.losses.cross_entropy,
        optimizer=adapt.only(optax.sgd(1e-2)),
        train=(tokens[:, :-1], tokens[:, 1:]),
        batch_size=2,
        devices=1,
    )
    folder.load_into(trainer)
    module = trainer.module()
    name = "model.layers.0.self_attn.q_proj.weight"
    came = load_file(tmp_path / "in" / "model.safetensors")
    layer = module.blocks[0].attention.query
    assert np.array_equal(layer.kernel[...].T, came[name])
    assert np.any(layer.lora_a[...]) and not np.any(layer.lora_b[...])

    layer.lora_b[...] = jnp.ones_like(layer.lora_b[...])
    out = lepton.hub.save(module, tmp_path / "out", like=folder)
    went = load_file(out / "model.safetensors")
    assert {key for key in came if not np.array_equal(came[key], went[key])} == {name}
    np.testing.assert_allclose(went[name], layer.merged_kernel().T, rtol=1e-6)


def test_another_model_is_refused(tmp_path):
    folder = lepton.hub.open(made(tmp_path))
    shape = dataclasses.replace(folder.shape, hidden=16)
    module = nnx.eval_shape(lambda: DecoderLM(shape, rngs=nnx.Rngs(0)))
    wanted = by_path(nnx.to_pure_dict(nnx.state(module)))
    with pytest.raises(lepton.ModelError, match="another than the folder's"):
        folder.weights(wanted)
    rotary = dataclasses.replace(folder.shape.rotary, theta=7.0)
    trainer = lepton.Trainer(
        model=partial(DecoderLM, dataclasses.replace(folder.shape, rotary=rotary)),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.identity(),
        batch_size=1,
        devices=1,
    )
    with pytest.raises(lepton.ModelError, match=r"rotary is Rotary\(theta=7.0"):
        folder.load_into(trainer)
    smaller = DecoderLM(shape, rngs=nnx.Rngs(0))
    with pytest.raises(lepton.ModelError, match="hidden is 16, and 40 there"):
        lepton.hub.save(smaller, tmp_path / "out", like=folder)


@has_stories
def test_the_stories_begin_as_they_are_known_to():
    module = lepton.hub.open(STORIES / "hf").module()
    pieces = pieces_of(STORIES / "tok512.bin")
    cache = module.empty_cache(1, 32)
    token = jnp.asarray([[1]])
    text = b""
    for _ in range(20):
        logits, cache = run(module, token, cache=cache)
        token = logits[:, -1:].argmax(-1)
        text += pieces[int(token[0, 0])]
    assert text.startswith(b" Once upon a time, there was a little girl named Lily")


def pieces_of(path):
    content = path.read_bytes()
    place = 4
    pieces = []
    while place < len(content):
        length = int.from_bytes(content[place + 4 : place + 8], "little")
        pieces.append(content[place + 8 : place + 8 + length])
        place += 8 + length
    return pieces


# ---- the command line ----


def test_the_command_line_takes_a_folder_in_and_out(tmp_path, capsys):
    folder = made(tmp_path / "in", tied="tied, with a copy", dtype="F16")
    (folder / "tokenizer.json").write_bytes(b"{ }")
    model = str(tmp_path / "model")
    assert main(["hub", "import", str(folder), "-o", model, "--devices", "1"]) == 0
    assert "lm_head.weight is the same" in capsys.readouterr().out
    out = tmp_path / "out"
    assert main(["hub", "export", model, "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "llama"
    assert contents(out) == contents(folder)
    assert (out / "tokenizer.json").read_bytes() == b"{ }"


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    say(made(tmp_path), rope_scalling=None)
    assert main(["hub", "import", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "'rope_scalling'" in told and "--ignore rope_scalling" in told
    arguments = ["hub", "import", str(tmp_path), "--ignore", "rope_scalling"]
    assert main(arguments) == 0


def test_pickled_weights_are_refused(tmp_path):
    made(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(lepton.CheckpointError, match="pickled"):
        lepton.hub.open(tmp_path)


# ---- what is not understood ----

FAULTS = {
    "an unknown key": ({"rms_norm_epz": 1e-5}, "did you mean 'rms_norm_eps'"),
    "a missing key": ({"hidden_size": ...}, "there is no hidden_size"),
    "another family": ({"model_type": "lama"}, "did you mean 'llama'"),
    "no language model": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "reads language models",
    ),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantized"),
    "code of its own": ({"auto_map": {"x": "y"}}, "its own code"),
    "another activation": ({"hidden_act": "siluu"}, "did you mean 'silu'"),
    "half a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "a rope type": ({"rope_parameters": {"rope_type": "longrope"}}, "is unknown"),
    "a key of the rope": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2, "beta": 1}},
        "'beta' is no key of rope type 'linear'",
    ),
    "a factor that is missing": (
        {"rope_parameters": {"rope_type": "linear"}},
        "there is no factor",
    ),
    "a scaling without type": ({"rope_parameters": {"factor": 2}}, "has no type"),
    "two scalings": (
        {"rope_scaling": {"type": "linear", "factor": 2}},
        "are both there and differ",
    ),
    "two thetas": (
        {"rope_theta": 7.0},
        "rope_theta is 7.0 outside and 500.0 inside",
    ),
    "two types": (
        {"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 2}},
        "type is 'yarn' and rope_type is 'linear'",
    ),
    "no number": ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
    "no heads": ({"num_key_value_heads": 3}, "must be a multiple of 3 kv_heads"),
    "biases that are not there": ({"attention_bias": True}, "are missing"),
    "more layers": ({"num_hidden_layers": 4}, "model.layers.3."),
    "fewer layers": ({"num_hidden_layers": 2}, "none of llama's: model.layers.2."),
    "another vocabulary": ({"vocab_size": 65}, r"is \[64, 32\], but config.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_understood_is_an_error(tmp_path, fault):
    made(tmp_path)
    keys, words = FAULTS[fault]
    say(tmp_path, **{name: value for name, value in keys.items() if value is not ...})
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for name, value in keys.items():
        if value is ...:
            del content[name]
    path.write_text(json.dumps(content))
    with pytest.raises(lepton.LeptonError, match=words) as raised:
        lepton.hub.open(tmp_path)
    assert raised.value.remedy and raised.value.where


def test_windows_that_contradict_themselves_are_errors(tmp_path):
    flags = {"scaling": "default", "schema": "type", "groups": 2}
    made(tmp_path, "qwen2", flags | {"windows": "by type"})
    say(tmp_path, use_sliding_window=False)
    with pytest.raises(lepton.ModelError, match="but there is none"):
        lepton.hub.open(tmp_path)
    say(tmp_path, use_sliding_window=True, layer_types=["sliding_attention"])
    with pytest.raises(lepton.ModelError, match="names 1 layers of 3"):
        lepton.hub.open(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "surplus", "absent", "moved", "outside"])
def test_files_that_do_not_fit_their_index_are_errors(tmp_path, damage):
    made(tmp_path, files="several")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    named = index["weight_map"]
    first = tmp_path / "model-00001-of-00002.safetensors"
    words = {
        "cut": "can't be read",
        "surplus": "does not name",
        "absent": "there is no file",
        "moved": "but it does not",
        "outside": "not in the folder",
    }[damage]
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-8])
    elif damage == "surplus":
        del named["model.norm.weight"]
    elif damage == "absent":
        first.unlink()
    elif damage == "moved":
        other = {name for name in named.values() if name != named["model.norm.weight"]}
        named["model.norm.weight"] = other.pop()
    else:
        named["model.norm.weight"] = "../model.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(lepton.CheckpointError, match=words):
        lepton.hub.open(tmp_path)


def test_a_dtype_that_float32_does_not_hold_is_an_error(tmp_path):
    made(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.norm.weight"
    tensors[name] = tensors[name].astype(np.float64)
    save_file(tensors, path)
    with pytest.raises(lepton.CheckpointError, match="is of type F64"):
        lepton.hub.open(tmp_path)
