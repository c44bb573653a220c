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


@pytest.mark.parametrize("spoil", [spoil_bytes, spoil_shape, spoil_names])
def test_a_spoilt_file_is_made_again(tmp_path, spoil):
    cache, original = LogitsCache(tmp_path), Original()
    read(opened(cache), original)
    spoil(next(tmp_path.rglob("000001.safetensors")))
    found = read(opened(cache), original)
    assert original.batches_run == 3
    assert torch.equal(found[1][1], output_of(tiny_batches()[1]))
    read(opened(cache), original)
    assert original.batches_run == 3


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
