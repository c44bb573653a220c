from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from autoq.errors import (
    AutoqError,
    BudgetInfeasibleError,
    ExportError,
    StoreError,
    StudyLockedError,
    UnknownNameError,
    VerificationError,
)
from autoq.formats import FORMATS

SEARCH = ("search", "models/llama", "--bits", "6")


def only_json(text: str):
    """The one object of `text`; NaN and infinities are refused."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_search_passes_every_option_on(api, run):
    result = run(
        *SEARCH,
        *("--formats", "nvfp4, fp8", "--calib", "text.jsonl", "--store", "sqlite:///other.db"),
        *("--kv-formats", "fp8, nvfp4", "--kv-bits", "7.5", "--kv-scope", "layer"),
        *("--export", "out", "--container", "compressed-tensors", "--name", "mine"),
        *("--target", "vllm:h200"),
        *("--rule", "a=none", "--rule", "b=fp8", "--include", "lm_head", "--exclude", "x*"),
        *("--calib-sequences", "8", "--sequence-length", "32", "--batch-size", "2"),
        *("--held-out-sequences", "3", "--dtype", "float32", "--device", "cpu", "--seed", "5"),
        *("--calibration", "max"),
        *("--estimator", "sequence_projection", "--draws", "3", "--confidence", "0.9"),
        *("--max-gb", "24", "--max-active-bits", "5.5", "--max-latency-ms", "3", "--gpu", "h200"),
        *("--latency-table", "times.json", "--latency-batch", "8", "--max-kl", "0.01"),
        *("--overwrite", "--no-measure", "--compare-uniform", "--wait", "1.5"),
        *("--refine", "20", "--objective", "kl + 0.1*ppl", "--min-task", "arc_easy>=0.99x"),
        *("--workers", "2", "--trust-remote-code"),
    )
    assert result.exit_code == 0, result.stderr
    assert api.arguments("search") == {
        "refine": 20,
        "refine_options": {"objective": "kl + 0.1*ppl", "constraints": ("arc_easy>=0.99x",)},
        "workers": 2,
        "devices": None,
        "max_memory": None,
        "ranks": False,
        "ray": None,
        "model": "models/llama",
        "effective_bits": 6.0,
        "max_gb": 24.0,
        "max_active_bits": 5.5,
        "max_latency_ms": 3.0,
        "max_kl": 0.01,
        "gpu": "h200",
        "latency_table": "times.json",
        "latency_tokens": 8,
        "formats": ["nvfp4", "fp8"],
        "kv_formats": ["fp8", "nvfp4"],
        "kv_bits": 7.5,
        "kv_scope": "layer",
        "rules": ("a=none", "b=fp8"),
        "include": ("lm_head",),
        "exclude": ("x*",),
        "calibration_data": "text.jsonl",
        "calibration_sequences": 8,
        "sequence_length": 32,
        "batch_size": 2,
        "held_out_sequences": 3,
        "container": "compressed-tensors",
        "target": "vllm:h200",
        "dtype": "float32",
        "device": "cpu",
        "calibration": "max",
        "estimator": "sequence_projection",
        "draws": 3,
        "confidence": 0.9,
        "seed": 5,
        "store": "sqlite:///other.db",
        "name": "mine",
        "export": "out",
        "overwrite": True,
        "measure": False,
        "compare_uniform": True,
        "trust_remote_code": True,
        "wait_seconds": 1.5,
    }


def test_search_takes_any_budget_and_refuses_none(api, run):
    assert run("search", "models/llama", "--max-gb", "24").exit_code == 0
    assert api.arguments("search")["effective_bits"] is None
    result = run("search", "models/llama")
    assert result.exit_code == 2
    assert "a search needs a budget; give --bits" in result.stderr


def test_search_prints_budgets_and_what_the_plan_takes(api, run):
    printed = run(*SEARCH).stdout
    for line in (
        "6.0000 effective bits per weight, 24 GB on disk, KL divergence 0.01000",
        "2.034e-05 GB for all weights of the checkpoint",
        "5.2500 for weights that a token touches",
        "1.235 ms for the searched layers and 8 tokens, on NVIDIA H200 SXM",
    ):
        assert line in printed


def test_show_prints_the_proof_that_a_plan_is_the_smallest(api, run):
    assert "gap in size" not in run("show").stdout
    api.least = {
        "resource": "effective_bits",
        "loss_limit": 0.0125,
        "value": 5.9375,
        "bound": 5.93,
        "gap": 0.00126,
    }
    printed = " ".join(run("show").stdout.replace("│", " ").split())
    assert "0.13 % (none predicted to lose at most 0.01250 takes less than" in printed
    assert "5.9300 effective bits per weight)" in printed


def test_a_reader_that_has_had_enough_is_no_error(tmp_path):
    """What a rich table is written to is closed before it is all written."""
    script = (
        "import sys\n"
        "from autoq.cli import app\n"
        "sys.stdin.read()\n"
        "sys.argv = ['autoq', 'formats']\n"
        "app()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    child.stdout.close()
    child.stdout = None
    _, errors = child.communicate(timeout=120)
    assert (child.returncode, errors) == (0, "")


def test_search_without_formats_leaves_the_choice_to_the_api(api, run):
    run(*SEARCH)
    assert api.arguments("search")["formats"] is None


def test_store_comes_from_the_environment(api, run, monkeypatch):
    monkeypatch.setenv("AUTOQ_STORE", "postgresql://host/studies")
    run(*SEARCH)
    assert api.arguments("search")["store"] == "postgresql://host/studies"


def test_search_prints_tables_on_stdout_and_the_rest_on_stderr(api, run):
    result = run(*SEARCH, "--report", "r.html")
    for text in (
        "5.9375 (as ModelOpt counts: 5.8750)",
        "0.04370 nats per token (95 %: 0.04010 to no upper bound)",
        "91.21 %",
        "model.layers.1.mlp.down_proj",
        "study: llama-ab12 in sqlite:///autoq.db",
        "checkpoint: out (modelopt, 17.91 KiB, read back and verified)",
        "report: r.html",
    ):
        assert text in result.stdout
    assert "\x1b" not in result.stdout
    assert "a library talks" not in result.stdout
    assert "a library talks" in result.stderr
    assert "scoring: 4 of 4" in result.stderr
    assert "note: w4a8_awq is not portable" in result.stderr


def test_search_writes_the_report(api, run, tmp_path):
    run(*SEARCH, "--report", "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "model.layers.1.mlp.down_proj" in page
    assert [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name] == []


def test_quiet_prints_only_the_last_lines(api, run):
    result = run(*SEARCH, "--quiet")
    assert result.stdout.splitlines() == [
        "study: llama-ab12 in sqlite:///autoq.db",
        "checkpoint: out (modelopt, 17.91 KiB, read back and verified)",
    ]
    assert "scoring" not in result.stderr
    assert "note: w4a8_awq is not portable" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((*SEARCH, "--report", "r.html"), id="search"),
        pytest.param(("show",), id="show"),
        pytest.param(("frontier", "--html", "f.html"), id="frontier"),
        pytest.param(("export", "out"), id="export"),
        pytest.param(("eval", "llama-ab12"), id="eval"),
        pytest.param(("list",), id="list"),
        pytest.param(("formats",), id="formats"),
    ],
)
def test_json_is_one_object_and_nothing_else(api, run, arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert isinstance(only_json(result.stdout), dict)


def test_json_of_search_has_the_summary_with_null_for_infinity(api, run):
    found = only_json(run(*SEARCH, "--json").stdout)
    assert found["predicted_loss_interval"] == [0.0401, None]
    assert found["groups"][0]["standard_errors"] == {"nvfp4": None, "fp8": 0.0001}
    assert found["assignment"]["model.layers.0.mlp.down_proj"] == "fp8"
    assert found["report"] is None


FAILURES = [
    pytest.param(
        BudgetInfeasibleError(2.0, 4.5, 16.0),
        2,
        "error: a budget of 2 effective bits is outside what the allowed formats reach: from "
        "4.5000 (every group in its smallest format) to 16.0000 (every group in its largest); "
        "choose a budget in that range, or change --formats or --rule",
        id="budget",
    ),
    pytest.param(
        UnknownNameError("no format named 'x'"), 2, "error: no format named 'x'", id="name"
    ),
    pytest.param(ExportError("out\nexists"), 2, "error: out exists", id="export"),
    pytest.param(StudyLockedError("held by 7"), 2, "error: held by 7", id="locked"),
    pytest.param(StoreError("cannot open"), 2, "error: cannot open", id="store"),
    pytest.param(VerificationError("differs"), 4, "error: differs", id="verification"),
    pytest.param(AutoqError("NaN"), 1, "error: NaN", id="other"),
    pytest.param(
        OSError(28, "No space left on device", "autoq.db"),
        2,
        "error: autoq.db: No space left on device; see that the path exists, can be written and "
        "has room",
        id="full_disk",
    ),
    pytest.param(
        RuntimeError("shapes\ndiffer"),
        1,
        "error: unexpected RuntimeError: shapes differ; set AUTOQ_DEBUG=1 for the traceback",
        id="unexpected",
    ),
    pytest.param(
        KeyboardInterrupt(),
        130,
        "interrupted: the study keeps what was finished; run the same command again to continue",
        id="interrupted",
    ),
]


@pytest.mark.parametrize(("failure", "code", "line"), FAILURES)
def test_failures_are_one_line_and_an_exit_code(api, run, failure, code, line):
    api.failure = failure
    result = run(*SEARCH, "--json")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == line
    assert "Traceback" not in result.stderr


def test_debugging_shows_the_traceback_and_keeps_the_exit_code(api, run, monkeypatch):
    monkeypatch.setenv("AUTOQ_DEBUG", "1")
    api.failure = StudyLockedError("held by 7")
    result = run(*SEARCH)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("search", "models/llama", "--bits", "many"), id="budget_no_number"),
        pytest.param(("show", "--colour"), id="unknown_option"),
        pytest.param(("export",), id="no_output"),
        pytest.param(("export", "a", "b", "c"), id="too_many_outputs"),
        pytest.param(("report",), id="no_report_file"),
        pytest.param(("eval", "x", "--sequences", "0"), id="no_sequences"),
    ],
)
def test_usage_errors_end_with_code_2_and_no_work(api, run, arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert result.stdout == ""
    assert api.calls == []


def test_report_that_cannot_be_written_is_refused_before_any_work(api, run):
    result = run(*SEARCH, "--report", "missing/r.html")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: the folder missing does not exist; create it or name another file\n"
    )
    assert api.calls == []


def test_show_passes_the_budget_on(api, run):
    result = run("show", "llama", "--bits", "5.5")
    assert result.exit_code == 0
    assert api.arguments("open_study") == {"name": "llama", "store": "sqlite:///autoq.db"}
    assert api.arguments("summary") == {
        "effective_bits": 5.5,
        "max_gb": None,
        "max_active_bits": None,
    }


def test_show_takes_other_budgets(api, run):
    assert run("show", "llama", "--max-gb", "2.5", "--max-active-bits", "5").exit_code == 0
    assert api.arguments("summary") == {
        "effective_bits": None,
        "max_gb": 2.5,
        "max_active_bits": 5.0,
    }


def test_frontier_stops_at_a_size(api, run):
    result = run("frontier", "llama", "--max-gb", "2.5")
    assert api.arguments("frontier") == {"points": 24, "max_gb": 2.5}
    assert "on disk" in result.stdout
    assert "32 GB" in result.stdout


def test_leaving_the_study_out_takes_the_latest_and_says_so(api, run):
    assert "study llama-ab12 (the only one in sqlite:///autoq.db)" in run("show").stderr
    api.names = ["first", "second"]
    assert "study second (the latest of 2 in sqlite:///autoq.db)" in run("show").stderr


def test_missing_store_is_refused_and_not_created(api, run, tmp_path):
    (tmp_path / "autoq.db").unlink()
    for arguments in (("show",), ("frontier", "x"), ("export", "out"), ("eval", "x")):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: the study store sqlite:///autoq.db does not exist")
    assert run("list").stdout == "no studies in sqlite:///autoq.db\n"
    assert only_json(run("list", "--json").stdout)["studies"] == []
    assert api.calls == []
    assert list(tmp_path.iterdir()) == []


def test_many_groups_share_lines_with_equal_neighbours(api, run):
    api.blocks = 40
    output = run("show").stdout
    assert "model.layers.[0-39].self_attn.o_proj" in output
    assert "163.8 K" in output or "164 K" in output
    assert "model.layers.7.self_attn.o_proj" not in output


def test_narrow_terminals_fold_names_and_lose_nothing(api, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "48")
    lines = run("show").stdout.splitlines()
    assert max(map(len, lines)) <= 48 + len("checkpoint: out (modelopt, 17.91 KiB, ")
    assert all(len(line) <= 48 for line in lines if not line.startswith("checkpoint"))
    assert "down_proj" in "".join("".join(line.split()) for line in lines)


def test_frontier_marks_the_plan_and_writes_the_page(api, run, tmp_path):
    result = run("frontier", "llama-ab12", "--points", "7", "--html", "f.html")
    assert api.arguments("frontier") == {"points": 7, "max_gb": None}
    (marked,) = [line for line in result.stdout.splitlines() if "< this plan" in line]
    assert "5.9375" in marked
    assert "picture: f.html" in result.stdout
    assert "4.5000" in (tmp_path / "f.html").read_text(encoding="utf-8")


def test_frontier_lists_the_plan_between_solved_budgets(api, run):
    api.bits = 5.0
    lines = run("frontier").stdout.splitlines()
    (marked,) = [index for index, line in enumerate(lines) if "< this plan" in line]
    assert "5.0000" in lines[marked]
    assert "4.5000" in lines[marked - 1]
    assert "5.9375" in lines[marked + 1]


def test_frontier_json_has_every_plan(api, run):
    found = only_json(run("frontier", "llama-ab12", "--json").stdout)
    assert [plan["effective_bits"] for plan in found["plans"]] == [4.5, 5.9375, 16.0]
    assert found["plans"][0]["assignment"] == {"model.layers.0.mlp.down_proj": "fp8"}
    assert found["plans"][0]["predicted_loss_interval"] == [0.0, None]
    assert found["png"] is None


def test_export_takes_study_and_folder(api, run):
    result = run(
        *("export", "llama", "--bits", "5.5", "--container", "compressed-tensors", "out"),
        "--overwrite",
    )
    assert result.exit_code == 0, result.stderr
    arguments = api.arguments("export")
    assert type(arguments.pop("progress")).__name__ == "LineProgress"
    assert arguments == {
        "destination": "out",
        "effective_bits": 5.5,
        "max_gb": None,
        "max_active_bits": None,
        "container": "compressed-tensors",
        "tp_size": 1,
        "pp_size": 1,
        "with_past": False,
        "streamed": False,
        "overwrite": True,
    }
    assert api.arguments("open_study")["name"] == "llama"


def test_export_for_the_ranks_of_an_engine(api, run):
    run("export", "llama", "out", "--container", "tensorrt-llm", "--tp", "2", "--pp", "4")
    arguments = api.arguments("export")
    assert arguments["container"] == "tensorrt-llm"
    assert (arguments["tp_size"], arguments["pp_size"]) == (2, 4)


def test_export_with_one_place_takes_the_latest_study(api, run):
    run("export", "out")
    assert api.arguments("open_study")["name"] is None
    assert api.arguments("export")["destination"] == "out"


def test_eval_prints_what_was_measured(api, run):
    result = run("eval", "llama-ab12", "--reference", "models/llama", "--data", "text.txt")
    assert result.stdout.splitlines() == [
        "llama-ab12 against the original, on held-out text:",
        "  KL divergence: 0.05000 (95 %: 0.04000 to 0.07000)",
        "  perplexity: 12.30",
    ]
    assert api.arguments("evaluate")["reference"] == "models/llama"
    assert api.arguments("evaluate")["data"] == "text.txt"


def test_eval_of_held_out_data_names_no_file(api, run):
    run("eval", "llama-ab12", "--data", "held_out")
    assert api.arguments("evaluate")["data"] is None


def test_eval_refuses_a_folder_that_is_no_checkpoint(api, run, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("eval", "empty")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: the folder empty has no config.json; name a checkpoint's folder or a study\n"
    )


def test_report_command_writes_one_file(api, run, tmp_path):
    result = run("report", "llama-ab12", "--output", "r.html")
    assert result.stdout == "report: r.html\n"
    assert (tmp_path / "r.html").is_file()


def test_list_shows_budgets_and_exports(api, run):
    output = run("list").stdout
    assert "llama-ab12" in output
    assert "4.8, 6, 24 GB, 0.01 KL" in output
    assert "2026-01-02 03:04" in output


def test_formats_names_where_exports_load(run):
    found = only_json(run("formats", "--json").stdout)["formats"]
    bits = {entry["name"]: entry["effective_bits"] for entry in found}
    known = {"fp8": 8, "nvfp4": 4.5, "w4a8_awq": 4.25, "int4_awq": 4.25, "int8_sq": 8, "none": 16}
    assert {name: bits[name] for name in known} == known
    assert set(bits) == set(FORMATS)
    assert "w4a8_awq" in run("formats").stdout
    assert "when named" in run("formats").stdout


def test_version_is_printed(run):
    from autoq import __version__

    assert run("--version").stdout == f"autoq {__version__}\n"


def test_help_is_there_at_once_and_loads_nothing_heavy():
    probe = (
        "import sys\n"
        "from autoq.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'sqlalchemy', 'matplotlib'}\n"
        "sys.exit(f'loaded {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "frontier" in done.stdout
    assert time.monotonic() - started < 30  # a hang, not a benchmark


def test_formats_lists_those_of_the_cache(run):
    found = only_json(run("formats", "--json").stdout)["kv_cache_formats"]
    assert {entry["name"]: entry["bits"] for entry in found} == {
        "fp8": 8,
        "int8": 8,
        "nvfp4": 4.5,
        "none": 16,
    }
    assert "KV cache" in run("formats").stdout


def test_formats_says_what_calibrations_can_be_named(run):
    found = only_json(run("formats", "--json").stdout)["calibrations"]
    printed = run("formats").stdout
    for name in found:
        assert name in printed
    assert {"rtn", "mse", "awq_lite", "awq"} <= set(found)
    assert "percentile:99.9+awq+gptq" in printed
