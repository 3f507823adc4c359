"""The model card of a saved model: how to load it, the picture of its shapes, and the report."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch import nn

from ..surgery import report_acu
from .record import Record

__all__ = ["PICTURE", "write_card"]

#: The file name of the picture beside the card.
PICTURE = "shapes.png"

_CARD = """---
library_name: lightning_acu
tags:
- lightning_acu
- active-convolution
---

# {title}

{kind} with {active} of {convolutions} convolutions active: their taps sit at learned positions
([Active Convolution Units](https://arxiv.org/abs/1703.09076)).

```python
from lightning_acu import from_pretrained
{imports}
model = from_pretrained({where!r}{how})
```
{note}{picture}{report}"""

_NOTE = """
`{builder}` builds the model. The files do not contain that code.
"""


def write_card(folder: Path, model: nn.Module, record: Record, title: str, where: str) -> None:
    """Write README.md into ``folder``, and the picture if Matplotlib is installed.

    Args:
        folder: where to write.
        model: the model that is saved.
        record: that of its file.
        title: the heading.
        where: what :func:`lightning_acu.from_pretrained` takes: a repository or a folder.
    """
    picture = table = imports = how = note = ""
    if find_spec("matplotlib"):
        from ..figures import plot_shapes

        plot_shapes(model).savefig(folder / PICTURE)
        picture = f"\n![Where the taps of each active layer are]({PICTURE})\n"
    report = report_acu(model)
    if find_spec("rich"):
        table = "\n```text\n" + "\n".join(line.rstrip() for line in str(report).splitlines()) + "\n```\n"
    if (builder := record["architecture"].get("builder")) is not None:
        module, _, qualname = builder.partition(":")
        imports = f"from {module} import {qualname.partition('.')[0]}\n"
        how = f", builder={qualname}"
        note = _NOTE.format(builder=builder)
    card = _CARD.format(
        title=title, kind=type(model).__name__, active=len(report.converted), convolutions=len(report.rows),
        imports=imports, where=where, how=how, note=note, picture=picture, report=table,
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")
