"""The web page's files: autoq's own, and the charting library from its installed package."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from autoq.service.problems import Refusal

router = APIRouter(include_in_schema=False)

_PAGE = Path(__file__).parent / "page"
_CHARTS = "plotly.min.js"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
    ".woff2": "font/woff2",
}
_COMPRESSED = frozenset({".html", ".css", ".js", ".svg", ".json"})
_SMALLEST = 1_000  # bytes; less is not worth compressing


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it is sent: compressed once, tagged by its content."""

    media_type: str
    tag: str
    content: bytes | None  # None of what is only kept compressed
    packed: bytes | None


@router.get("/")
@router.get("/studies")
@router.get("/studies/{path:path}")
@router.get("/compare")
@router.get("/jobs")
@router.get("/jobs/{path:path}")
def show_page(request: Request) -> Response:
    """The page; what it shows it asks of the API, as any other client does."""
    return _sent(request, _PAGE / "index.html")


@router.get("/assets/{name:path}")
def show_asset(request: Request, name: str) -> Response:
    """One of the page's files."""
    path = _assets().get(name)
    if path is None:
        raise Refusal("not-found", f"the page has no file {name[:80]!r}")
    return _sent(request, path)


def _sent(request: Request, path: Path) -> Response:
    file = _file(path, path.stat().st_mtime_ns)
    headers = {"etag": file.tag, "cache-control": "no-cache", "vary": "accept-encoding"}
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    if file.packed is not None and _takes_gzip(request):
        headers["content-encoding"] = "gzip"
        return Response(file.packed, headers=headers, media_type=file.media_type)
    content = file.content if file.content is not None else path.read_bytes()
    return Response(content, headers=headers, media_type=file.media_type)


def _takes_gzip(request: Request) -> bool:
    return "gzip" in request.headers.get("accept-encoding", "")


@cache
def _assets() -> dict[str, Path]:
    """Name in an address -> file; nothing else is ever opened, whatever an address says."""
    folder = _PAGE / "assets"
    own = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in _TYPES
    }
    charts = _installed("plotly", f"package_data/{_CHARTS}")
    return own if charts is None else {**own, _CHARTS: charts}


def _installed(package: str, inside: str) -> Path | None:
    """A file of an installed package, which is not loaded for that."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / inside
    return path if path.is_file() else None


def _remembered(
    read: Callable[[Path], _File],
) -> Callable[[Path, int], _File]:
    """Files by path, read anew when they were written since."""
    known: dict[Path, tuple[int, _File]] = {}

    def file(path: Path, written: int) -> _File:
        found = known.get(path)
        if found is None or found[0] != written:
            found = known[path] = (written, read(path))
        return found[1]

    return file


def _read(path: Path) -> _File:
    content = path.read_bytes()
    packs = path.suffix in _COMPRESSED and len(content) >= _SMALLEST
    packed = gzip.compress(content, 6, mtime=0) if packs else None
    return _File(
        media_type=_TYPES[path.suffix],
        tag=f'W/"{hashlib.sha256(content).hexdigest()[:32]}"',
        content=content if packed is None else None,
        packed=packed,
    )


_file = _remembered(_read)
