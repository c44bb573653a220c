"""The original's outputs on disk: run once, bit for bit, within the bound, and never trusted blindly."""

from contextlib import nullcontext

import pytest
import torch

from autoq.errors import InputError
from autoq.evaluators import Reference, Subject, measure_metrics
from autoq.evaluators.cache import LogitsCache
from autoq.evaluators.compact import CompactLogits, bytes_per_token
from autoq.testing.evaluators import disturbed, tiny_batches
from autoq.testing.tiny_models import VOCABULARY_SIZE, make_tiny_model

TOKENS = 4 * 24
FULL_BYTES = TOKENS * VOCABULARY_SIZE * 4
NAMES = ["kl", "kl_p99", "top1", "ppl"]


class Original:
    """Counts how many batches it was run on."""

    def __init__(self):
        self.batches_run = 0

    def __call__(self, part):
        self.batches_run += len(part)
        return [output_of(ids) for ids in part]


def output_of(ids):
    generator = torch.Generator().manual_seed(int(ids.sum()))
    return torch.randn(*ids.shape, VOCABULARY_SIZE, generator=generator)


def opened(cache, fingerprint="a", batches=None):
    return cache.outputs(
        tiny_batches() if batches is None else batches,
        fingerprint=fingerprint,
        width=VOCABULARY_SIZE,
        dtype=torch.float32,
    )


def read(outputs, original):
    return list(outputs.pairs(original, lambda ids: ids))


def test_the_original_runs_once_and_its_outputs_come_back_to_the_bit(tmp_path):
    original, cache = Original(), LogitsCache(tmp_path)
    for _ in range(3):
        found = read(opened(cache), original)
        assert original.batches_run == 2
        for ids, (same, expected, changed) in zip(tiny_batches(), found, strict=True):
            assert torch.equal(same, ids)
            assert torch.equal(changed, ids)
            assert torch.equal(expected, output_of(ids))


def test_another_model_other_tokens_and_another_form_are_kept_apart(tmp_path):
    original = Original()
    read(opened(LogitsCache(tmp_path)), original)
    read(opened(LogitsCache(tmp_path), fingerprint="b"), original)
    other = [batch.flip(0) for batch in tiny_batches()]
    read(opened(LogitsCache(tmp_path), batches=other), original)
    read(opened(LogitsCache(tmp_path, kept=3)), original)
    assert original.batches_run == 8
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("max_bytes", "kept"),
    [
        (FULL_BYTES, None),
        (FULL_BYTES - 1, 142),  # 8 bytes each and 8 more a token, of less than 4 * 288
        (TOKENS * bytes_per_token(5), 5),
        (TOKENS * bytes_per_token(1), 1),
    ],
)
def test_as_much_is_kept_as_fits(tmp_path, max_bytes, kept):
    outputs = opened(LogitsCache(tmp_path, max_bytes=max_bytes))
    assert outputs.kept == kept
    assert outputs.is_exact == (kept is None)
    read(outputs, Original())
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    headers = 2 * 1024  # of two files
    assert size <= max_bytes + headers
    for ids, (_, expected, _) in zip(tiny_batches(), read(outputs, Original()), strict=True):
        if kept is not None:
            wanted = CompactLogits.reduce(output_of(ids), ids, kept)
            for name in ("indices", "log_probabilities", "log_rest", "next_token"):
                assert torch.equal(getattr(expected, name), getattr(wanted, name))


@pytest.mark.parametrize(("max_bytes", "kept"), [(TOKENS * 16 - 1, None), (TOKENS * 24 - 1, 2)])
def test_what_cannot_fit_is_refused(tmp_path, max_bytes, kept):
    with pytest.raises(InputError, match="allow more, or measure on fewer sequences"):
        opened(LogitsCache(tmp_path, max_bytes=max_bytes, kept=kept))


def test_what_was_used_longest_ago_makes_room(tmp_path):
    cache = LogitsCache(tmp_path, max_bytes=2 * FULL_BYTES + 4096)
    original = Original()
    import os

    for age, name in ((300, "a"), (200, "b")):
        read(opened(cache, name), original)
        newest = max(tmp_path.iterdir(), key=lambda folder: folder.stat().st_mtime)
        stamp = newest.stat().st_mtime - age
        os.utime(newest, (stamp, stamp))
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "folder").mkdir()
    read(opened(cache, "c"), original)
    assert original.batches_run == 6
    read(opened(cache, "b"), original)
    assert original.batches_run == 6  # still there
    read(opened(cache, "a"), original)
    assert original.batches_run == 8  # was the oldest
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "folder").is_dir()


def spoil_bytes(file):
    file.write_bytes(file.read_bytes()[:100])


def spoil_shape(file):
    from safetensors.torch import save_file

    save_file({"output": torch.zeros(1, 2, VOCABULARY_SIZE)}, file)


def spoil_names(file):
    from safetensors.torch import save_file

    save_file({"logits": torch.zeros(2, 24, VOCABULARY_SIZE)}, file)


def spoil_one_bit(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def spoil_digest(file):
    """Another output of the right shape, as an older version would have left it: without digest."""
    from safetensors.torch import save_file

    save_file({"output": torch.zeros(2, 24, VOCABULARY_SIZE)}, file)


@pytest.mark.parametrize(
    "spoil", [spoil_bytes, spoil_shape, spoil_names, spoil_one_bit, spoil_digest]
)
def test_a_spoilt_file_is_made_again_and_said(tmp_path, spoil):
    said = []
    cache, original = LogitsCache(tmp_path, note=said.append), Original()
    read(opened(cache), original)
    assert not said
    spoil(next(tmp_path.rglob("000001.safetensors")))
    found = read(opened(cache), original)
    assert original.batches_run == 3
    (text,) = said
    assert "000001.safetensors is not what was written there" in text
    assert torch.equal(found[1][1], output_of(tiny_batches()[1]))
    read(opened(cache), original)
    assert original.batches_run == 3
    assert len(said) == 1


def test_a_file_that_goes_while_it_is_used_is_made_again(tmp_path):
    original = Original()
    outputs = opened(LogitsCache(tmp_path))
    read(outputs, original)
    next(tmp_path.rglob("000000.safetensors")).unlink()
    for runs in (3, 4):  # computed in passing, then written again
        assert torch.equal(read(outputs, original)[0][1], output_of(tiny_batches()[0]))
        assert original.batches_run == runs
    read(outputs, original)
    assert original.batches_run == 4


def many_batches(count=10):
    generator = torch.Generator().manual_seed(5)
    return list(torch.randint(4, 200, (2 * count, 6), generator=generator).split(2))


def in_full(folder, batches, **options):
    return LogitsCache(folder, **options).outputs_in_full(
        batches, fingerprint="a", width=VOCABULARY_SIZE, dtype=torch.float32
    )


def test_outputs_read_through_are_those_of_the_original_in_the_order_of_the_batches(tmp_path):
    original, batches = Original(), many_batches()
    for _ in range(2):
        found = in_full(tmp_path, batches).through(original)(batches)
        for ids, output in zip(batches, found, strict=True):
            assert torch.equal(output, output_of(ids))
    assert original.batches_run == len(batches)


def test_outputs_read_through_are_asked_for_in_parts(tmp_path):
    original, batches = Original(), many_batches()
    outputs = in_full(tmp_path, batches)
    (found,) = outputs.through(original)(batches[7:8])
    assert torch.equal(found, output_of(batches[7]))
    assert outputs.through(original)([]) == []
    assert original.batches_run == 1


def test_workers_that_begin_together_share_the_work(tmp_path, monkeypatch):
    """Each sees between its own batches what the other has written: none is computed twice."""
    batches, first, second = many_batches(12), Original(), Original()
    another = in_full(tmp_path, [ids.clone() for ids in batches])

    def interrupted(part):
        found = first(part)
        if first.batches_run == 4:  # the other begins now, elsewhere, and is done before us
            monkeypatch.setattr("os.getpid", lambda: 2)
            another.through(second)(another._batches)
        return found

    monkeypatch.setattr("os.getpid", lambda: 0)
    found = in_full(tmp_path, batches).through(interrupted)(batches)
    assert all(
        torch.equal(output, output_of(ids)) for ids, output in zip(batches, found, strict=True)
    )
    assert first.batches_run == 4
    assert second.batches_run == 12  # ours were not written yet when it began


def test_outputs_that_do_not_fit_in_full_are_left_alone(tmp_path):
    batches = many_batches(2)
    needed = 2 * 12 * VOCABULARY_SIZE * 4
    for too_few in (0, 1, needed - 1):
        assert in_full(tmp_path, batches, max_bytes=too_few) is None
    assert in_full(tmp_path, batches, kept=3) is None
    assert not list(tmp_path.iterdir())
    assert in_full(tmp_path, batches, max_bytes=needed) is not None


def test_other_arithmetic_is_kept_apart(tmp_path):
    original, batches = Original(), many_batches(1)
    threads = torch.get_num_threads()
    in_full(tmp_path, batches).through(original)(batches)
    try:
        torch.set_num_threads(threads + 1)
        in_full(tmp_path, batches).through(original)(batches)
    finally:
        torch.set_num_threads(threads)
    assert original.batches_run == 2


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="must be a folder that can be written to"):
        opened(LogitsCache(tmp_path / "file" / "inside"))


def test_a_full_disk_is_said_and_measuring_goes_on(tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    said, original, batches = [], Original(), many_batches(3)
    found = in_full(tmp_path, batches, note=said.append).through(original)(batches)
    assert all(
        torch.equal(output, output_of(ids)) for ids, output in zip(batches, found, strict=True)
    )
    assert len(said) == 3
    assert "No space left" in said[0]


def test_metrics_from_files_are_those_from_memory_and_compact_ones_bound_the_divergence(tmp_path):
    model = make_tiny_model("llama", dtype=torch.float32)
    subject = Subject(model=disturbed(model, 0.2))

    def measured(outputs=None):
        reference = Reference(tiny_batches(), lambda: nullcontext(model), outputs=outputs)
        return measure_metrics(subject, reference, NAMES)

    expected = measured()
    assert measured(opened(LogitsCache(tmp_path))) == expected
    compact = measured(opened(LogitsCache(tmp_path, kept=4)))
    assert 0 < compact["kl_divergence"].value < 0.99 * expected["kl_divergence"].value
    assert compact["top1_agreement"] == expected["top1_agreement"]
    assert compact["perplexity"] == expected["perplexity"]
    whole = measured(opened(LogitsCache(tmp_path, kept=VOCABULARY_SIZE)))
    # float32 logarithms carry errors of about 1e-6
    assert whole["kl_divergence"].value == pytest.approx(expected["kl_divergence"].value, rel=1e-4)
