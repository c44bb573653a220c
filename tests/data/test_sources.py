import itertools
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants

from autoq.bundled.language import documents
from autoq.data import batches, load_token_sequences
from autoq.data.offline import cache_only_when_offline, offline_reason
from autoq.data.splitting import spread_part
from autoq.errors import DataError
from autoq.testing.tiny_models import VOCABULARY_SIZE, make_byte_tokenizer

EOS = 2
TOKENIZER = make_byte_tokenizer()
LINES = [f"document number {n}: {'x' * n}" for n in range(80)]


def load(source, sequence_length=16, sequences=4, **changes):
    arguments = {
        "tokenizer": TOKENIZER,
        "sequence_length": sequence_length,
        "sequences": sequences,
        "vocab_size": VOCABULARY_SIZE,
    }
    return load_token_sequences(source, **(arguments | changes))


def tokens_of(texts):
    return [t for text in texts for t in [*TOKENIZER(text)["input_ids"], EOS]]


def write_text(path, texts):
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def write_jsonl(path, texts, field="text"):
    return write_text(path, [json.dumps({"id": 7, field: text}) for text in texts])


def write_parquet(path, texts, field="text"):
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), field: texts}), path)
    return path


def write_dataset(path, texts, field="text"):
    datasets.Dataset.from_dict({"id": list(range(len(texts))), field: texts}).save_to_disk(path)
    return path


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "dataset": write_dataset}


@pytest.mark.parametrize("field", ["text", "content"])
@pytest.mark.parametrize("kind", WRITERS)
def test_documents_are_joined_by_end_of_text_and_cut(kind, field, tmp_path):
    source = WRITERS[kind](tmp_path / f"data.{kind}", LINES, field)
    found = load(source)
    assert found.ids.dtype == np.int64
    assert found.ids.reshape(-1).tolist() == tokens_of(LINES)[:64]
    assert found.description == f"{source} (first 75%, calibration)"


@pytest.mark.parametrize("kind", WRITERS)
def test_held_out_text_comes_from_the_back(kind, tmp_path):
    source = WRITERS[kind](tmp_path / f"data.{kind}", LINES)
    found = load(source, split="held_out").ids.reshape(-1).tolist()
    assert found == tokens_of(reversed(LINES))[:64]


def test_one_long_text_has_both_parts(tmp_path):
    text = "".join(f"{n:04d} " for n in range(1000))
    source = tmp_path / "long.txt"
    source.write_text(text)
    calibration = load(source, sequence_length=50, sequences=75)
    held_out = load(source, sequence_length=50, sequences=25, split="held_out")
    both = np.concatenate([calibration.ids, held_out.ids]).reshape(-1)
    assert TOKENIZER.decode(both) == text
    assert held_out.description.endswith("(last 25%, held out)")


def test_unicode_line_separators_do_not_break_jsonl(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\u2028two"}\n\n' * 30, encoding="utf-8")
    assert load(path, held_out_share=0.0).ids.shape == (4, 16)


def test_tokenizer_that_ends_documents_itself_is_not_helped():
    def tokenizer(texts, verbose):
        return {"input_ids": [[7, EOS] for _ in texts]}

    tokenizer.eos_token_id = EOS
    assert load(None, tokenizer=tokenizer).ids.reshape(-1).tolist() == [7, EOS] * 32


@pytest.mark.parametrize("source", [None, "bundled"])
@pytest.mark.parametrize("split", ["calibration", "held_out"])
def test_bundled_text_is_that_of_the_split_and_seed(source, split):
    found = load(source, split=split, seed=5, sequence_length=32, sequences=8)
    expected = tokens_of(itertools.islice(documents(5, split), 4))[:256]
    assert found.ids.reshape(-1).tolist() == expected
    assert found.description == f"bundled text ({split}, seed 5)"


def test_bundled_splits_and_seeds_differ():
    found = {
        load(None, split=split, seed=seed).sha256
        for split in ("calibration", "held_out")
        for seed in (0, 1)
    }
    assert len(found) == 4


def test_equal_arguments_give_equal_ids():
    first, second = load(None), load(None)
    assert np.array_equal(first.ids, second.ids)
    assert first.sha256 == second.sha256


def test_hash_sees_shape_and_ids():
    square, row = load(None, 4, 4), load(None, 16, 1)
    assert np.array_equal(square.ids.reshape(-1), row.ids.reshape(-1))
    assert square.sha256 != row.sha256


ROWS = np.arange(160).reshape(8, 20)


def write_ids(path, ids):
    if path.suffix == ".npy":
        np.save(path, ids)
    else:
        torch.save(torch.from_numpy(ids), path)
    return path


@pytest.mark.parametrize("suffix", ["npy", "pt"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_rows_of_ids_are_cut_one_by_one(tmp_path, suffix, dtype):
    path = write_ids(tmp_path / f"ids.{suffix}", ROWS.astype(dtype))
    found = load(path, 8, 5).ids
    assert found[:, 0].tolist() == [0, 8, 20, 28, 40]
    assert found.dtype == np.int64
    assert load(path, 8, 3, split="held_out").ids[:, 0].tolist() == [140, 148, 120]


@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_stream_of_ids(tmp_path, suffix):
    path = write_ids(tmp_path / f"ids.{suffix}", np.arange(100))
    assert np.array_equal(load(path, 25, 3).ids, np.arange(75).reshape(3, 25))
    assert np.array_equal(load(path, 25, 1, split="held_out").ids, [np.arange(75, 100)])


def test_saved_batch_with_input_ids(tmp_path):
    torch.save({"input_ids": torch.from_numpy(ROWS)}, tmp_path / "batch.pt")
    assert load(tmp_path / "batch.pt", 20, 6).ids[5, 0] == 100


def test_ids_need_no_tokenizer(tmp_path):
    assert load(write_ids(tmp_path / "ids.npy", ROWS), tokenizer=None).ids.shape == (4, 16)


def test_share_decides_who_gets_what(tmp_path):
    path = write_ids(tmp_path / "ids.npy", ROWS)
    assert len(load(path, 20, 8, held_out_share=0.0).ids) == 8
    assert len(load(path, 20, 8, held_out_share=1.0, split="held_out").ids) == 8


@pytest.mark.parametrize("seed", range(10))
def test_held_out_never_overlaps_calibration(tmp_path, seed):
    generator = np.random.default_rng(seed)
    shape = (int(generator.integers(1, 9)), int(generator.integers(16, 40)))
    path = write_ids(tmp_path / "ids.npy", np.arange(np.prod(shape)).reshape(shape))
    seen = {}
    for split in ("calibration", "held_out"):
        for length in (1, 3, 7):
            sequences = 0
            while True:
                try:
                    ids = load(path, length, sequences + 1, split=split, vocab_size=10**6).ids
                except DataError:
                    break
                sequences += 1
                seen.setdefault(split, set()).update(ids.reshape(-1).tolist())
    assert seen["calibration"] and seen["held_out"]
    assert not seen["calibration"] & seen["held_out"]


class Trap:
    def __reduce__(self):
        return (print, ("unpickled",))


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".npy":
        np.save(path, content, allow_pickle=True)
    else:
        torch.save(content, path)
    return path


REFUSED = [
    pytest.param(
        "a.jsonl", '{"text": "a"}\n{"text"\n', r"a\.jsonl line 2 is not JSON", id="bad_json"
    ),
    pytest.param(
        "a.jsonl", '{"n": 1}', r"line 1 must be an object with a field of text", id="no_text"
    ),
    pytest.param("a.jsonl", "[1]", r"line 1 must be an object", id="json_list"),
    pytest.param("a.txt", b"\xff\xfe\xff", r"must be UTF-8 text", id="not_utf8"),
    pytest.param("a.parquet", "no", r"cannot be read as parquet", id="not_parquet"),
    pytest.param("a.csv", "a,b", r"must be one of \.txt, .*\.pt, got", id="unknown_suffix"),
    pytest.param("a.npy", "no", r"must be an array written by numpy\.save", id="not_npy"),
    pytest.param("a.npy", "PK\x03\x04 no archive", r"must be an array written by", id="half_zip"),
    pytest.param("a.npy", np.array([Trap()]), r"without pickled objects", id="pickled_npy"),
    pytest.param("a.npy", np.zeros((4, 32)), r"must be integers, and .* has float64", id="floats"),
    pytest.param("a.npy", np.zeros((2, 2, 2), int), r"has shape \[2, 2, 2\]", id="three_axes"),
    pytest.param("a.pt", "no", r"needs unpickling", id="not_pt"),
    pytest.param("a.pt", Trap(), r"nothing that needs unpickling", id="pickled_pt"),
    pytest.param(
        "a.pt", torch.zeros(99), r"must be integers, and .* torch\.float32", id="float_pt"
    ),
    pytest.param("a.pt", [1, 2], r"must hold a tensor of token ids", id="list_pt"),
    pytest.param(
        "a.npy", np.full(99, 288), r"from 0 to 287, and .* has 288; use", id="id_too_high"
    ),
    pytest.param("a.npy", np.full(99, -1), r"from 0 to 287, and .* has -1", id="id_negative"),
    pytest.param("a.npy", np.arange(20), r"needs 16 tokens, and .* has only 15", id="no_sequence"),
    pytest.param("a.txt", "short", r"needs 16 tokens, and .* has only 4;", id="short_text"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_refused(tmp_path, capsys, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "content", "available"),
    [
        ("a.npy", ROWS, r"120 in rows that give 6 sequences;"),
        ("a.npy", np.arange(100), r"75 in rows that give 4 sequences;"),
        ("a.txt", "x" * 100, r"76;"),
    ],
    ids=["rows", "stream", "text"],
)
def test_too_little_states_needed_and_available(tmp_path, name, content, available):
    message = rf"7 sequences of 16 tokens need 112 tokens, and .* has {available} give more data"
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / name, content), sequences=7)


def test_parquet_without_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match="must have a column of text, and has none"):
        load(tmp_path / "n.parquet")


@pytest.mark.parametrize("source", ["no/such.jsonl", "./nothing", "/no/such/file"])
def test_missing_file(source):
    with pytest.raises(DataError, match=rf"{source} does not exist; check the path"):
        load(source)


@pytest.fixture
def reachable_hub(monkeypatch):
    """As if there were a network."""
    monkeypatch.setattr("autoq.data.offline.offline_reason", lambda: None)


def test_dataset_that_cannot_be_fetched(monkeypatch, reachable_hub):
    def no_network(*arguments, **options):
        raise ConnectionError("Couldn't reach the hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(DataError, match=r"'wiki:test' is no file here.*\(Couldn't reach the hub\)"):
        load("wiki:test")


class Hub:
    """A dataset of the hub, which says what was asked of it and how many rows were read."""

    def __init__(self, monkeypatch, texts):
        self.asked, self.rows_read, self._texts = [], 0, texts
        monkeypatch.setattr(datasets, "load_dataset", self._load)

    def _load(self, name, configuration, *, split, streaming):
        self.asked.append((name, configuration, split, streaming))
        return datasets.IterableDataset.from_generator(self._rows)

    def _rows(self):
        for text in self._texts:
            self.rows_read += 1
            yield {"id": 1, "text": text}


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("wiki", ("wiki", None, "train", True)),
        ("wiki:test", ("wiki", None, "test", True)),
        ("wiki:raw:test", ("wiki", "raw", "test", True)),
    ],
)
def test_dataset_by_name_and_split(monkeypatch, reachable_hub, source, asked):
    hub = Hub(monkeypatch, [LINES[0], None, *LINES[1:]])
    # Of four documents the last is held out, and the empty one gives nothing.
    calibration = tokens_of([LINES[0], LINES[1], LINES[3], LINES[4], LINES[5]])
    assert load(source).ids.reshape(-1).tolist() == calibration[:64]
    assert hub.asked == [asked]


def test_no_more_of_a_stream_is_read_than_needed(monkeypatch, reachable_hub):
    hub = Hub(monkeypatch, itertools.cycle(LINES))  # without end
    found = load("wiki", split="held_out", sequences=2, sequence_length=32)
    assert found.ids.reshape(-1).tolist() == tokens_of(LINES[3::4])[:64]
    # Documents are tokenised 64 at a time, and every fourth is held out.
    assert hub.rows_read == 64 * 4


def test_a_stream_that_breaks_off(monkeypatch, reachable_hub):
    class Rows:
        def __iter__(self):
            yield "one"
            raise OSError("connection reset")

    Hub(monkeypatch, Rows())
    with pytest.raises(DataError, match=r"no dataset of that name .*\(connection reset\)"):
        load("wiki")


def test_a_folder_of_data_files_is_streamed(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "train-0.jsonl", LINES[:40])
    write_jsonl(tmp_path / "train-1.jsonl", LINES[40:])
    calibration = [line for index, line in enumerate(LINES) if index % 4 != 3]
    assert load(tmp_path, sequences=8).ids.reshape(-1).tolist() == tokens_of(calibration)[:128]


def test_offline_a_dataset_is_refused_at_once_and_nothing_is_tried(monkeypatch, tmp_path):
    def no_connection(*arguments, **options):
        raise AssertionError("tried the network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("socket.create_connection", no_connection)
    monkeypatch.setattr("socket.socket.connect", no_connection)
    with pytest.raises(DataError) as caught:
        load("owner/name:test")
    assert str(caught.value) == (
        "'owner/name:test' is no file here, the dataset owner/name is not in the cache of "
        "`datasets`, and HF_HUB_OFFLINE is set; fetch it where there is a network, or give a file "
        "(.txt, .jsonl, .parquet, .npy, .pt)"
    )


def test_without_a_network_the_libraries_stop_trying_until_it_is_over(monkeypatch):
    def refused(*arguments, **options):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.create_connection", refused)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with cache_only_when_offline() as reason:
        assert reason == "there is no network to huggingface.co"
        assert constants.is_offline_mode()
        assert datasets.config.HF_HUB_OFFLINE
    assert not constants.is_offline_mode()


@pytest.mark.parametrize(
    ("proxies", "expected"),
    [
        ({}, ("huggingface.co", 443)),
        ({"https": "http://proxy:3128"}, ("proxy", 3128)),
        ({"https": "proxy:3128"}, ("proxy", 3128)),
        ({"all": "https://proxy"}, ("proxy", 443)),
    ],
)
def test_the_network_is_looked_for_where_connections_go(monkeypatch, proxies, expected):
    asked = []

    def refused(address, timeout):
        asked.append(address)
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.create_connection", refused)
    monkeypatch.setattr("autoq.data.offline.getproxies", lambda: proxies)
    monkeypatch.setattr("autoq.data.offline.proxy_bypass", lambda host: False)
    assert offline_reason() == f"there is no network to {expected[0]}"
    assert asked == [expected]


@pytest.mark.parametrize(
    ("share", "held_out"), [(0.0, []), (0.25, [3, 7]), (0.3, [3, 6]), (1.0, list(range(9)))]
)
def test_held_out_documents_are_spread_over_a_stream(share, held_out):
    items = [[n] for n in range(9)]
    assert list(spread_part(items, "held_out", share)) == [[n] for n in held_out]
    calibration = [[n] for n in range(9) if n not in held_out]
    assert list(spread_part(items, "calibration", share)) == calibration


def test_a_dataset_has_at_most_three_parts():
    with pytest.raises(DataError, match="a dataset is NAME, NAME:SPLIT or"):
        load("a:b:c:d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "text needs the model's tokenizer"),
        ({"sequences": 0}, "sequences must be at least 1, got 0"),
        ({"sequence_length": -1}, "sequence_length must be at least 1, got -1"),
        ({"split": "test"}, "split must be 'calibration' or 'held_out', got 'test'"),
        ({"held_out_share": 1.5}, r"held_out_share must be in \[0, 1\], got 1\.5"),
        ({"vocab_size": 10}, r"token ids must be from 0 to 9"),
    ],
)
def test_wrong_request(changes, message):
    with pytest.raises(DataError, match=message):
        load(None, **changes)


def test_batches_keep_order_and_the_rest():
    ids = np.arange(30).reshape(5, 6)
    found = list(batches(ids, 2))
    assert [len(batch) for batch in found] == [2, 2, 1]
    assert torch.equal(torch.cat(found), torch.from_numpy(ids))


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(batches(np.zeros((1, 1), dtype=np.int64), 0))
