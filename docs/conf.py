"""The documentation site, built by Sphinx: `make docs`.

The source folder is the repository, not docs/, so that links between Markdown files mean here what they mean there.
"""

import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc.mock import mock

import lightning_acu

sys.path.insert(0, str(Path(__file__).parent))
import api_pages

project = "lightning_acu"
author = "lightning_acu contributors"
project_copyright = f"{author}, Apache-2.0"
release = version = lightning_acu.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**", "*.md", "lightning_acu/**/README.md", "benchmarks/README.md", "paper/README.md", "tests/README.md",
]  # fmt: skip
exclude_patterns = ["README.md", ".*", "build", "dist", "runs", "data", "**/__pycache__"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
highlight_language = "none"

myst_heading_anchors = 4

autosummary_generate = False
autodoc_inherit_docstrings = False  # hooks would repeat Lightning's own documentation
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_mock_imports = ["transformers"]
napoleon_use_ivar = True
napoleon_use_param = False  # arguments that are described together stay together
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = f"lightning_acu {release}"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_extra_path = ["site/root"]  # / leads to /docs/
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}


def resolve_by_ending(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.Node | None:
    """Docstrings refer to a name by the module it is defined in; it is documented under its public, shorter path."""
    if node.get("refdomain") != "py":
        return None
    python = env.domains["py"]
    parts = node["reftarget"].lstrip(".").split(".")
    for start in range(len(parts)):
        ending = "." + ".".join(parts[start:])
        found = [name for name in python.objects if name.endswith(ending)]
        if len(found) == 1:
            return python.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, contnode)
    return None


def write_api_pages(app: Sphinx) -> None:
    """Write the pages of the API, before Sphinx looks for sources."""
    with mock(autodoc_mock_imports):
        api_pages.write(Path(app.confdir) / "api")


def drop_empty_patterns(app: Sphinx, docname: str, source: list[str]) -> None:
    """Patterns of the table of contents that match no file, as ``gpu*`` before there is such a page, are no error."""
    if docname == root_doc:
        docs = Path(app.confdir)

        def matches(pattern: str) -> bool:
            folder = docs.parent if pattern.startswith("/") else docs
            return any(folder.glob(f"{pattern.lstrip('/')}.md"))

        lines = [line for line in source[0].splitlines() if not line.endswith("*") or matches(line)]
        source[0] = "\n".join(lines)


def show_factories(
    app: Sphinx, what: str, name: str, value: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Sphinx cannot read the default ``<factory>`` of a dataclass's field, and would not break such a signature."""
    return signature and signature.replace("<factory>", "..."), returns


def keep_colons(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Napoleon takes what is before a colon in the first line of an attribute for its type: put a comment before it."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def setup(app: Sphinx) -> None:
    """Connect the functions above to the events of a build."""
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", drop_empty_patterns)
    app.connect("autodoc-process-signature", show_factories)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before napoleon
    app.connect("missing-reference", resolve_by_ending)
