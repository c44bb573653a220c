"""Paths from the network: what is let through lies in a root, whatever it is spelled like."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from autoq.bundled import model_path
from autoq.errors import DataError, ExportError, InputError, ModelError
from autoq.service.guard.roots import Roots

WEIGHTS = b"12345678"


def write_model(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Some"], **config}))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Roots with a model, data and exports, and things outside of them that links lead to."""
    write_model(tmp_path / "models" / "org" / "small")
    write_model(tmp_path / "secret" / "model")
    (tmp_path / "secret" / "text.txt").write_text("secret")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text.txt").write_text("text")
    (tmp_path / "exports").mkdir()
    for root in ("models", "data", "exports"):
        (tmp_path / root / "out").symlink_to(tmp_path / "secret")
        (tmp_path / root / "circle").symlink_to(tmp_path / root / "circle")
        (tmp_path / root / "up").symlink_to("..")
    return tmp_path


@pytest.fixture
def roots(place: Path) -> Roots:
    return Roots(models=[place / "models"], data=[place / "data"], exports=place / "exports")


HOSTILE = [
    "",
    "/",
    ".",
    "..",
    "~",
    "~root/x",
    "/etc/passwd",
    "//etc/passwd",
    "{root}",
    "{root}/..",
    "{root}/../secret/text.txt",
    "{root}/../secret/model",
    "{root}/./org",
    "{root}/org/../../secret/model",
    "{root}//etc/passwd",
    "{root}/",
    "{root}/org/",
    "{root}/out",
    "{root}/out/model",
    "{root}/out/text.txt",
    "{root}/out/new",
    "{root}/up/secret/model",
    "{root}/up",
    "{root}/circle",
    "{root}/circle/x",
    "{root}\\..\\secret",
    "..\\secret",
    "C:\\Windows",
    "C:/Windows",
    "\\\\host\\share",
    "file:///etc/passwd",
    "http://example.org/model",
    "s3://bucket/model",
    "org/small",
    "meta-llama/Llama-3",
    "allenai/c4:train",
    "secret/model",
    "{root}/.hidden",
    "{root}/.git/config",
    "{root}/-rf",
    "-rf",
    "--help",
    "{root}/%2e%2e/secret",
    "%2e%2e/secret",
    "{root}/..%2fsecret",
    "{root}/\x00",
    "{root}\x00/org",
    "{root}/org\n",
    "{root}/a\r\nb",
    "{root}/\x1b[2J",
    "{root}/\u202eredro",
    "{root}/zero\u200bwidth",
    "{root}/\u2028line",
    "{root}/\ud800",
    "{root}/" + "a" * 256,
    "{root}/" + "é" * 128,
    "{root}/" + "a/" * 600 + "a",
    "a" * 100_000,
    "{ROOT}",
    "{root} ",
    " {root}",
    "{root}/org/small/config.json/x",
    "\uff3f/\uff0e\uff0e/secret",
]
"""{root} stands for the root's name; none of these leads to something that may be used."""


@pytest.mark.parametrize("written", HOSTILE)
@pytest.mark.parametrize("use", ["model", "data", "checkpoint"])
def test_hostile_paths_are_refused(roots, place, use, written):
    name = {"model": "models", "data": "data", "checkpoint": "exports"}[use]
    path = written.replace("{root}", name).replace("{ROOT}", name.upper())
    if use == "data" and path == name:
        pytest.skip("the root of data may itself be data, if nothing else lies in it")
    if use == "checkpoint" and path == name:
        pytest.skip("looked at below: a root may itself be a checkpoint")
    with pytest.raises(InputError) as caught:
        getattr(roots, use)(path)
    assert str(place) not in str(caught.value), "messages do not say where roots lie"
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2_000


OUTSIDE_OR_ROOT = [
    path
    for path in HOSTILE
    # These name places inside of the root where something may be written.
    if path not in ("{root}/%2e%2e/secret", "{root}/..%2fsecret")
    and path not in ("{root}/circle", "{root}/circle/x", "{root}/org/small/config.json/x")
]


@pytest.mark.parametrize("written", OUTSIDE_OR_ROOT)
def test_hostile_exports_are_refused(roots, place, written):
    with pytest.raises(ExportError) as caught:
        roots.new_export(written.replace("{root}", "exports").replace("{ROOT}", "EXPORTS"))
    assert str(place) not in str(caught.value)


ALPHABET = st.text(st.sampled_from("ab./\\-~%:\x00 é\u202e"), max_size=12)
PART = st.sampled_from(["..", ".", "", "org", "small", "out", "up", "circle", "model", "new", "~"])
PATHS = st.one_of(
    st.text(max_size=40),
    ALPHABET,
    st.tuples(st.sampled_from(["models", "data", "exports", ""]), st.lists(PART, max_size=5)).map(
        lambda parts: "/".join((parts[0], *parts[1]))
    ),
    st.tuples(st.sampled_from(["models", "data", "exports"]), ALPHABET).map("/".join),
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=PATHS)
@example(path="models/org/small")
@example(path="data/text.txt")
@example(path="exports/new/deep")
def test_what_is_let_through_lies_in_its_root(roots, place, path):
    homes = {
        roots.model: [place / "models"],
        roots.data: [place / "data"],
        roots.new_export: [place / "exports"],
        roots.checkpoint: [place / "exports", place / "models"],
    }
    for resolve, allowed in homes.items():
        try:
            found = resolve(path)
        except InputError:
            continue
        real = os.path.realpath(found)
        assert str(found) == real, "what is opened has no links left to swap"
        assert any(Path(real).is_relative_to(home) for home in allowed)
        assert not Path(real).is_relative_to(place / "secret")


def test_a_model_its_checkpoint_data_and_an_export(roots, place):
    assert roots.model("models/org/small") == place / "models/org/small"
    assert roots.checkpoint("models/org/small") == place / "models/org/small"
    assert roots.data("data/text.txt") == place / "data/text.txt"
    assert roots.new_export("exports/a/b") == place / "exports/a/b"
    assert roots.model("bundled") == model_path()
    assert roots.data("bundled") is None
    assert roots.data(None) is None


def test_each_use_has_its_own_roots(roots):
    with pytest.raises(ModelError, match="of models"):
        roots.model("data/text.txt")
    with pytest.raises(DataError, match="of data"):
        roots.data("models/org/small")
    with pytest.raises(ExportError, match="of exports"):
        roots.new_export("models/new")


def test_without_roots_nothing_is_let_through():
    roots = Roots()
    with pytest.raises(ModelError, match="none, so the server must be given one"):
        roots.model("models/x")
    with pytest.raises(ExportError, match="--exports FOLDER"):
        roots.new_export("exports/x")
    assert [entry.path for entry in roots.models()] == ["bundled"]


def test_a_root_may_be_a_link_and_may_be_a_model(place):
    link = place / "link"
    link.symlink_to(place / "models" / "org" / "small")
    roots = Roots(models=[link])
    assert roots.names()["models"] == ("small",)
    assert roots.model("small") == place / "models/org/small"


def test_weights_that_link_out_of_the_roots_are_refused_until_the_root_holds_both(place):
    cache = place / "hub" / "models--a"
    snapshot = write_model(cache / "snapshots" / "1")
    (cache / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(cache / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    with pytest.raises(ModelError, match=r"'model.safetensors' in '1' leads out"):
        Roots(models=[snapshot]).model("1")
    both = Roots(models=[place / "hub"])
    assert both.model("hub/models--a/snapshots/1") == snapshot
    assert "hub/models--a/snapshots/1" in [entry.path for entry in both.models()]
    either = Roots(models=[snapshot, cache / "blobs"])
    assert either.model("1") == snapshot, "another root of the same use will do, too"


@pytest.mark.parametrize("name", ["tokenizer.json", "sub/tokenizer_config.json", "folder"])
def test_any_link_out_of_a_model_is_refused(roots, place, name):
    link = place / "models" / "org" / "small" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(place / "secret")
    with pytest.raises(ModelError, match="leads out of them"):
        roots.model("models/org/small")
    with pytest.raises(ModelError, match="leads out of them"):
        roots.checkpoint("models/org/small")


def test_a_pipe_in_a_model_is_refused_and_does_not_hang(roots, place):
    os.mkfifo(place / "models" / "org" / "small" / "tokenizer.json")
    with pytest.raises(ModelError, match="device, socket or pipe"):
        roots.model("models/org/small")


def test_a_link_that_is_swapped_after_the_first_check_is_seen_by_the_second(roots, place):
    link = place / "models" / "current"
    link.symlink_to(place / "models" / "org" / "small")
    assert roots.model("models/current") == place / "models/org/small"
    link.unlink()
    link.symlink_to(place / "secret" / "model")
    with pytest.raises(ModelError, match="leads out"):
        Roots.from_json(roots.to_json()).model("models/current")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ids.pt", "numpy.save"),
        ("data.pkl", "is one of"),
        ("archive.tar", "is one of"),
        ("none.txt", "must lead to something"),
        ("text.txt:train", "must lead to something"),
    ],
)
def test_data_that_takes_unpickling_or_is_no_data_is_refused(roots, place, name, reason):
    if not name.startswith(("none", "text.txt:")):
        (place / "data" / name).write_bytes(b"x")
    with pytest.raises(DataError, match=reason):
        roots.data(f"data/{name}")


@pytest.mark.parametrize("name", ["README.md", "loader.py", "more.pkl", "deep/card.yaml"])
def test_folders_of_data_hold_data_only(roots, place, name):
    folder = place / "data" / "set"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    assert roots.data("data/set") == folder
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(DataError, match="take it out"):
        roots.data("data/set")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ('{"_data_files": [{"filename": "../../secret/a.arrow"}]}', "of its own folder"),
        ('{"_data_files": [{"filename": "/etc/passwd"}]}', "of its own folder"),
        ('{"_data_files": 3}', "lists its files"),
        ("[" * 100_000, "lists its files"),
    ],
)
def test_saved_datasets_do_not_name_files_elsewhere(roots, place, state, reason):
    folder = place / "data" / "saved"
    folder.mkdir()
    (folder / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    (folder / "a.arrow").write_bytes(b"x")
    assert roots.data("data/saved") == folder
    (folder / "state.json").write_text(state)
    with pytest.raises(DataError, match=reason):
        roots.data("data/saved")


def test_names_of_roots_are_their_own(tmp_path):
    for name in ("a/models", "b/models", "bundled", ".cache", "with space"):
        (tmp_path / name).mkdir(parents=True)
    roots = Roots(
        models=[tmp_path / "a/models", tmp_path / "b/models", tmp_path / "bundled"],
        data=[tmp_path / "a/models", tmp_path / ".cache"],
        exports=tmp_path / "with space",
    )
    assert roots.names() == {
        "models": ("models", "models-2", "bundled-2"),
        "data": ("models", "cache"),
        "exports": ("with_space",),
    }
    assert Roots.from_json(json.loads(json.dumps(roots.to_json()))).names() == roots.names()


def test_exports_cannot_be_written_over_models_or_data(tmp_path):
    (tmp_path / "models" / "exports").mkdir(parents=True)
    for uses in ("models", "data"):
        with pytest.raises(InputError, match="without models and data"):
            Roots(**{uses: [tmp_path / "models"]}, exports=tmp_path / "models")
        with pytest.raises(InputError, match="without models and data"):
            Roots(**{uses: [tmp_path / "models"]}, exports=tmp_path)
    assert Roots(models=[tmp_path / "models"], exports=tmp_path / "models" / "exports")


def test_roots_are_folders(tmp_path):
    with pytest.raises(InputError, match="--models takes folders"):
        Roots(models=[tmp_path / "none"])


def test_models_are_found_within_bounds(place, roots):
    write_model(place / "models" / "quantised", quantization_config={"quant_method": "x"})
    write_model(place / "models" / ".hidden")
    write_model(place / "models" / "1" / "2" / "3" / "4")
    write_model(place / "models" / "1" / "2" / "3" / "5" / "too-deep")
    (place / "models" / "empty").mkdir()
    (place / "models" / "empty" / "config.json").write_text("{}")
    (place / "models" / "broken").mkdir()
    (place / "models" / "broken" / "config.json").write_text("[" * 100_000)
    found = roots.models()
    assert [entry.path for entry in found] == ["bundled", "models/1/2/3/4", "models/org/small"]
    assert (found[2].architecture, found[2].bytes) == ("Some", len(WEIGHTS))
    for entry in found[1:]:
        assert roots.model(entry.path), "what is listed can be named"


def test_a_model_whose_architecture_is_no_text_is_listed_all_the_same(place, roots):
    write_model(place / "models" / "odd", architectures=["\ud800Some"])
    found = {entry.path: entry for entry in roots.models()}
    assert found["models/odd"].architecture == "?Some"
    assert "?Some" in found["models/odd"].model_dump_json()


def test_what_clients_are_shown_of_a_path(roots, place):
    assert roots.public(place / "models" / "org" / "small") == "models/org/small"
    assert roots.public(str(place / "exports" / "a" / "b")) == "exports/a/b"
    assert roots.public(place / "models") == "models"
    assert roots.public(model_path()) == "bundled"
    assert roots.public(place / "models" / "out" / "model") == "model"
    assert roots.public("/etc/passwd") == "passwd"
    assert roots.public("C:\\models\\mine") == "mine"
    assert roots.public("org/name") == "name"
    assert roots.public("/nul\x00/x") == "x"
    assert roots.public(os.fsdecode(b"/tmp/\xff")) == "?"


def test_a_path_inside_two_roots_is_shown_by_the_nearer(place):
    (place / "models" / "exports").mkdir()
    roots = Roots(models=[place / "models"], exports=place / "models" / "exports")
    assert roots.public(place / "models" / "exports" / "a") == "exports/a"
    assert roots.checkpoint("exports") == place / "models" / "exports"


def test_work_is_refused_on_studies_of_models_and_data_elsewhere(roots, place):
    model, text = str(place / "models" / "org" / "small"), str(place / "data" / "text.txt")
    for usable in ((model, None), (model, "bundled"), (model, text), (str(model_path()), None)):
        roots.check_study(*usable)
    outside = str(place / "secret" / "model")
    for unusable in (outside, str(place / "models" / "out" / "model"), "", "org/small", "a\0b"):
        with pytest.raises(ModelError, match="--models") as caught:
            roots.check_study(unusable, None)
        assert str(place) not in str(caught.value)
    for unusable in (str(place / "secret" / "text.txt"), "allenai/c4", str(place / "data" / "out")):
        with pytest.raises(DataError, match="--data"):
            roots.check_study(model, unusable)
