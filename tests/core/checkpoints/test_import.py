"""`uni-instruct import`: a peer's file becomes a bundle that computes what the network in the file did, or nothing at all."""

import dataclasses
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from builders import checkpoints as made
from builders.damaged_checkpoints import FORMATS, mutated
from builders.peers import PEERS, peer
from uni_instruct.bundle import Bundle
from uni_instruct.checkpoints.checkpoint import read_checkpoint
from uni_instruct.checkpoints.import_bundle import ImportRequest, bundle_from_checkpoint
from uni_instruct.checkpoints.state_dict_adapter import translate
from uni_instruct.errors import UniInstructError
from uni_instruct.networks.build import build_denoiser, load_denoiser
from uni_instruct.networks.denoiser import Denoiser

Cli = Callable[..., tuple[int, str, str]]
# pickletools' own, of strings that changes have broken.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")


def images_of(denoiser: Denoiser) -> torch.Tensor:
    rng = torch.Generator().manual_seed(2)
    x, sigma = torch.randn(2, 3, 8, 8, generator=rng), torch.tensor([0.1, 2.5]).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        out: torch.Tensor = denoiser(x * sigma, sigma, torch.tensor([3, 7]) if denoiser.num_classes else None)
    return out


@pytest.mark.parametrize("name", PEERS)
def test_what_is_imported_computes_what_the_file_did(cli: Cli, tmp_path: Path, name: str) -> None:
    outer, denoiser = peer(name)
    if name == "EDM2":
        file = made.write_edm2_pickle(tmp_path / "snapshot.pkl", outer, encoder=made.PeerObject("StandardRGBEncoder"))
    else:
        file = made.write_sid_pickle(tmp_path / "snapshot.pkl", outer)
    code, out, errors = cli("import", file, "--out", tmp_path / "bundle", "--json")
    assert code == 0, errors
    bundle = Bundle.open(tmp_path / "bundle")
    assert json.loads(out)["weights_sha256"] == bundle.weights_sha256
    imported = load_denoiser(bundle)
    assert imported.preconditioning == denoiser.preconditioning
    assert torch.equal(images_of(imported), images_of(denoiser))
    said = bundle.spec.provenance["imported"]
    assert (said["file"], said["network"], said["class"]) == ("snapshot.pkl", "ema", PEERS[name][0])
    assert said["left_out"] == (["logvar_linear.weight"] if name == "EDM2" else ["u"] if "iDDPM" in name else [])


def test_an_import_replaces_what_an_import_made_and_nothing_else(cli: Cli, tmp_path: Path, tiny_bundle: Bundle) -> None:
    """A training's folder, or its generator, cannot be had again so."""
    run, weights = tmp_path / "run", tiny_bundle.path / "model.safetensors"
    shutil.copytree(tiny_bundle.path, run / "generator")
    (run / "recipe.yaml").write_text("name: x\ndata: digits\n")
    places = {run: "holds something that is not a bundle", run / "generator": "holds a bundle that was not imported"}
    for out, said in places.items():
        code, _, errors = cli("import", weights, "--out", out)
        assert (code, errors) == (2, f"error: {out} {said}; name another folder\n")
    assert Bundle.open(run / "generator").spec == tiny_bundle.spec
    for _ in range(2):
        assert cli("import", weights, "--out", tmp_path / "bundle")[0] == 0


@pytest.mark.parametrize("name", PEERS)
def test_bare_weights_tell_their_architecture(tmp_path: Path, name: str) -> None:
    _, denoiser = peer(name)
    tensors = {f"module.{key}": tensor.numpy() for key, tensor in denoiser.state_dict().items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    (stored,) = read_checkpoint(tmp_path / "weights.safetensors").networks
    found = translate(stored)
    assert (found.network, found.image_shape, found.num_classes) == (PEERS[name][3], (3, 8, 8), denoiser.num_classes)
    spec = found.spec(name="found")
    with torch.device("meta"):
        rebuilt = build_denoiser(spec)
    shapes = {key: tensor.shape for key, tensor in rebuilt.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in denoiser.state_dict().items()}


def test_a_teachers_file_starts_a_distillation(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = made.write_edm_pickle(tmp_path / "teacher.pkl", peer("DDPM++")[0])
    np.savez(tmp_path / "data.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    short = ["distillation.duration_kimg=0.008", "distillation.batch=4", "critic_warmup_kimg=0", "metric=none"]
    sets = ["--set", f"teacher={file}", f"data={tmp_path / 'data.npz'}", *short]
    code, _, errors = cli("train", "digits", "--out", tmp_path / "run", *sets)
    assert code == 0, errors
    spec = Bundle.open(tmp_path / "run" / "generator").spec
    assert spec.provenance["teacher"]["file"] == "teacher.pkl"
    assert (spec.network_args["dropout"], spec.steps) == (0.13, 1)
    (kept,) = (tmp_path / "cache" / "uni-instruct" / "imported").iterdir()
    assert Bundle.open(kept).spec.steps == 18


def test_a_generators_file_gets_a_reference_and_a_teachers_none(tmp_path: Path) -> None:
    outer, _ = peer("DDPM++")
    file = made.write_sid_pickle(tmp_path / "snapshot.pkl", outer)
    for role in ("generator", "teacher"):
        bundle = bundle_from_checkpoint(file, tmp_path / role, ImportRequest(role=role))
        assert (bundle.reference() is not None) is (role == "generator")


def test_a_training_state_offers_its_networks(cli: Cli, tmp_path: Path) -> None:
    nets = {role: peer("DDPM++")[0] for role in ("fake_score", "G", "G_ema")}
    with torch.no_grad():
        next(nets["G_ema"].parameters()).add_(1)
    file = made.write_sid_state(tmp_path / "state.pt", nets, modules=False)
    made_of = {}
    for role, options in {"G_ema_state": [], "fake_score_state": ["--network", "fake_score_state", "--as", "teacher"]}.items():
        code, out, errors = cli("import", file, "--out", tmp_path / role, "--json", *options)
        assert code == 0, errors
        made_of[role] = json.loads(out)
    assert made_of["G_ema_state"]["kind"] == "generator"
    assert made_of["G_ema_state"]["weights_sha256"] != made_of["fake_score_state"]["weights_sha256"]
    assert made_of["G_ema_state"]["provenance"]["imported"]["class"] == "read off the weights"

    code, _, errors = cli("import", file, "--out", tmp_path / "x", "--network", "G_average")
    assert code == 2
    assert "the file holds no network 'G_average'; choose one of fake_score_state, G_state, G_ema_state" in errors

    code, out, errors = cli("inspect", file, "--json")
    assert code == 0, errors
    facts = json.loads(out)
    assert (facts["format"], facts["imported_network"]) == ("sid training state", "G_ema_state")
    assert [network["network"] for network in facts["networks"]] == ["ddpmpp"] * 3


def forget(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.pop(name)


def put(name: str, array: np.ndarray) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.update({name: array})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forget("model.map_layer0.weight"), "do not fit together: 'map_layer0.weight'"),
        (forget("model.map_layer1.bias"), "lacks weights: model.map_layer1.bias"),
        (put("model.enc.8x8_extra.weight", np.zeros(3, np.float32)), "holds weights that are not its own: model.enc.8x8_extra"),
        (put("extra", np.zeros(3, np.float32)), "holds weights that are not its own: extra"),
        (
            put("model.map_layer1.bias", np.zeros(3, np.float32)),
            "of another shape: model.map_layer1.bias (3,) instead of (32,)",
        ),
        (put("model.map_layer1.bias", np.full(32, np.nan, np.float32)), "map_layer1.bias holds values that are not finite"),
        (put("model.map_layer1.bias", np.zeros(32, np.int64)), "map_layer1.bias is of type int64, not a float"),
        (put("model.dec.8x8_up.conv0.resample_filter", np.ones((1, 1, 2, 2), np.float32)), "conv0.resample_filter is not"),
    ],
)
def test_every_weight_is_accounted_for(
    cli: Cli, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    weights = {key: tensor.numpy() for key, tensor in peer("DDPM++")[1].state_dict().items()}
    change(weights)
    save_file(weights, tmp_path / "weights.safetensors")
    code, out, errors = cli("import", tmp_path / "weights.safetensors", "--out", tmp_path / "bundle")
    assert (code, out) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"peer_class": "StyleGenerator"},
            "preconditioning 'StyleGenerator' is not supported; give a file with one of EDMPrecond",
        ),
        ({"spectral": True}, "the network was made with 'spectral', which is not supported"),
        ({"img_channels": "three"}, "the file gives 'three' for img_channels"),
        ({"num_blocks": 10**9}, "the file gives '1000000000' for num_blocks"),
        ({"channel_mult": [1] * 1000}, "for channel_mult"),
        ({"sigma_data": float("nan")}, "the file gives 'nan' for sigma_data"),
    ],
)
def test_networks_that_are_not_known_are_refused(cli: Cli, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    outer, _ = peer("DDPM++")
    for name, value in changed.items():
        setattr(outer, name, value)
    code, _, errors = cli("import", made.write_sid_pickle(tmp_path / "x.pkl", outer), "--out", tmp_path / "bundle")
    assert code == 2
    assert message in errors
    assert not (tmp_path / "bundle").exists()


HOSTILE = [
    0,
    -1,
    1,
    3,
    10**9,
    2**63,
    0.0,
    -0.5,
    1e300,
    float("nan"),
    float("inf"),
    None,
    True,
    "",
    "x" * 10**6,
    "fourier",
    "skip",
]
HOSTILE += [[], [0], [1] * 10**6, [[1]], {"a": 1}, [None], ["1"], [1, 3, 3, 1], [-1, 2], [1e-300, 1]]


# One of each network; their variants differ in arguments that these have too.
QUICK = ("DDPM++", "ADM", "EDM2")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PEERS])
def test_no_configuration_hangs_or_ends_in_anything_but_a_network_or_an_error(tmp_path: Path, name: str) -> None:
    """Each argument in turn takes each hostile value, and pairs of them at random; memory is bounded."""
    (stored,) = read_checkpoint(made.write_sid_pickle(tmp_path / "x.pkl", peer(name)[0])).networks
    rng = np.random.default_rng(0)
    keys = [*sorted(stored.config), "preconditioning", "out_channels"]
    changes = [{key: value} for key in keys for value in HOSTILE]
    changes += [{keys[rng.integers(len(keys))]: HOSTILE[rng.integers(len(HOSTILE))] for _ in range(2)} for _ in range(100)]
    ends = set()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limit[1]))
    try:
        for change in changes:
            try:
                translate(dataclasses.replace(stored, config=stored.config | change))
                ends.add("network")
            except UniInstructError as error:
                ends.add(type(error).__name__)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert ends == {"network", "FileFormatError", "RequestError"}


def import_damaged(folder: Path, seeds: range) -> list[str]:
    """How imports of damaged files end: 'Bundle', or the class of the project's own error; anything else fails the test."""
    outer, denoiser = peer("DDPM++")
    for form, write in FORMATS.items():
        write(folder / form)
    made.write_edm_pickle(folder / "EDM", outer)
    made.write_edm_pickle(folder / "EDM, protocol 2", outer, 2)
    made.write_torch(folder / "state dict", denoiser.state_dict())
    save_file({key: tensor.numpy() for key, tensor in denoiser.state_dict().items()}, folder / "safetensors")
    originals = {form: (folder / form).read_bytes() for form in FORMATS}
    ends = []
    for seed in seeds:
        form = ("EDM", "EDM, protocol 2", "state dict", "safetensors")[seed % 4]
        (folder / "damaged").write_bytes(mutated(originals, form, seed))
        try:
            bundle_from_checkpoint(folder / "damaged", folder / "bundle", ImportRequest())
            load_denoiser(Bundle.open(folder / "bundle"))
            ends.append("Bundle")
        except UniInstructError as error:
            ends.append(type(error).__name__)
    return ends


def test_a_damaged_file_becomes_a_whole_bundle_or_an_error(tmp_path: Path) -> None:
    """Reading them is guarded in tests/core/checkpoints/test_checkpoint_fuzz.py; this goes on to the bundle."""
    ends = import_damaged(tmp_path, range(80))
    assert 4 < ends.count("Bundle") < 76


@pytest.mark.slow
def test_thousands_of_damaged_files_become_whole_bundles_or_errors(tmp_path: Path) -> None:
    assert set(import_damaged(tmp_path, range(200, 3200))) <= {"Bundle", "FileFormatError", "RequestError"}
