"""The documentation is true: its examples run, its links resolve, and nothing public is missing.

Run as a program, ``python tests/test_docs.py docs/exchange.md`` executes the examples of one page.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
)
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    for path in (ROOT / "src").rglob("*.py")
    if ">>>" in path.read_text()
)

# An opening fence, its info string, and the code. A page skips a block only by saying why:
# ```python no-run: needs a GPU
_BLOCK = re.compile(r"^```python(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_NO_RUN = re.compile(r" no-run: \S.+")
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]\n]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ (?P<text>.+)$", re.MULTILINE)

# The section headings of the numpydoc standard.
_SECTIONS = {
    "Parameters",
    "Returns",
    "Yields",
    "Receives",
    "Other Parameters",
    "Raises",
    "Warns",
    "Warnings",
    "See Also",
    "Notes",
    "References",
    "Examples",
    "Attributes",
    "Methods",
}

_DOCUMENTED = (types.FunctionType, property, staticmethod, classmethod)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """Give the line, the info string and the code of each python block of a page."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start("code")), match["info"], match["code"])
        for match in _BLOCK.finditer(text)
    ]


def run_page(page: Path) -> int:
    """Run the blocks of a page in order, in one namespace; return how many ran."""
    warnings.simplefilter("error")
    # Third parties are not ours to fix.
    for package in ("torch", "jax"):
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=package)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    namespace = {"__name__": "__main__"}
    count = 0
    for line, info, code in blocks(page):
        if not info:
            # The empty lines make a traceback name the line of the page.
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
            count += 1
    return count


def missing_frameworks(page: Path) -> list[str]:
    """Name the frameworks that a page uses and that are not installed."""
    code = "\n".join(code for _, info, code in blocks(page) if not info)
    return [
        name
        for name in ("torch", "jax", "ml_dtypes", "optax")
        if re.search(rf"\b{name}\b", code) and importlib.util.find_spec(name) is None
    ]


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_a_page_run(page: str) -> None:
    path = ROOT / page
    if missing := missing_frameworks(path):
        pytest.skip(f"the page uses {', '.join(missing)}")
    done = subprocess.run(
        [sys.executable, __file__, page],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_an_example_and_skips_no_block_without_a_reason(page: str) -> None:
    found = blocks(ROOT / page)
    assert found, "a page shows code"
    for line, info, _ in found:
        assert not info or _NO_RUN.fullmatch(info), f"line {line}: say 'no-run: why', not {info!r}"
    assert not found[0][1], "the first example runs"


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page: str) -> None:
    path = ROOT / page
    for match in _LINK.finditer(_FENCED.sub("", path.read_text())):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        where = path.parent / target if target else path
        assert where.is_file(), f"{match[0]} leads nowhere"
        if anchor:
            assert anchor in _anchors(where), f"{match[0]} names no heading"


def _anchors(page: Path) -> set[str]:
    headings = _HEADING.findall(_FENCED.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in headings}


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in text, f"{page.name} is not in mkdocs.yml"


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module: str) -> None:
    for name in ("torch", "jax"):
        if module.endswith(f".{name}"):
            pytest.importorskip(name)
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed


def _public() -> list[str]:
    import rlx_driver

    return list(rlx_driver.__all__)


@pytest.mark.parametrize("name", _public())
def test_every_public_name_is_in_the_pages(name: str) -> None:
    used = re.compile(rf"\brlx(?:_driver)?\.{name}\b|`{name}\b")
    pages = [page for page in PAGES if page != "docs/api.md"]
    assert any(used.search((ROOT / page).read_text()) for page in pages), f"{name}: not mentioned"


@pytest.mark.parametrize("name", _public())
def test_every_public_name_has_a_numpy_docstring(name: str) -> None:
    import rlx_driver

    thing = getattr(rlx_driver, name)
    described = thing if callable(thing) else type(thing)
    _check_docstring(name, described)
    if inspect.isclass(described) and not issubclass(described, BaseException):
        for attribute, member in vars(described).items():
            if attribute.startswith("_") or not isinstance(member, _DOCUMENTED):
                continue
            _check_docstring(f"{name}.{attribute}", member)


def _check_docstring(name: str, thing: object) -> None:
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    lines = text.splitlines()
    assert lines[0].endswith((".", ":")), f"{name}: the first line is a sentence"
    assert len(lines) == 1 or not lines[1], f"{name}: an empty line follows the first"
    for heading, rule in itertools.pairwise(lines):
        if rule and set(rule) == {"-"}:
            assert heading in _SECTIONS, f"{name}: {heading!r} is no numpydoc section"
            assert len(rule) == len(heading), f"{name}: the rule under {heading} has its length"
    if inspect.isfunction(thing) and "." not in name and inspect.signature(thing).parameters:
        assert "Parameters\n----------\n" in text or "; see `" in lines[0], (
            f"{name} says nothing of its parameters"
        )


def test_the_table_of_dtypes_is_the_one_in_the_code() -> None:
    from rlx_driver.dtypes import TABLE

    rows = {}
    for line in (ROOT / "docs" / "dtypes.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 6:
            rows[cells[0]] = cells[1:]
    narrowed = {"int64", "uint64", "float64", "complex128"}
    for record in TABLE.values():
        jax = "host only" if record.dlpack is None else "yes"
        assert rows[record.name] == [
            record.short or "none",
            "none" if record.dlpack is None else "{}, {}".format(*record.dlpack),
            "no" if record.torch is None else "yes",
            "x64 only" if record.name in narrowed else jax,
            "yes" if record.numpy_exports else "no" if record.dlpack is None else "by the driver",
        ]


def test_every_error_has_a_row() -> None:
    from rlx_driver import errors

    text = (ROOT / "docs" / "errors.md").read_text()
    for name in errors.__all__:
        error = getattr(errors, name)
        if name == "DriverError" or issubclass(error, Warning):
            assert name in text
            continue
        base = error.__bases__[-1].__name__
        assert re.search(rf"^\| `{name}` \| `{base}` \|", text, re.MULTILINE), name


if __name__ == "__main__":
    if not run_page(ROOT / sys.argv[1]):
        sys.exit(f"{sys.argv[1]} has no example that runs")
