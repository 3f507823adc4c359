"""Every file is written whole or not at all: from within ``write_whole`` or ``write_whole_folder``."""

import ast
from pathlib import Path

import pytest

import lightning_acu

PACKAGE = Path(lightning_acu.__file__).parent

#: Methods and functions that write a file.
WRITERS = {
    "write_text", "write_bytes", "savefig", "save_file", "save", "dump", "copyfile", "copy2", "tofile",
    "to_csv", "writelines", "imsave", "savetxt", "savez",
}  # fmt: skip

#: Functions that write whole what others write for them.
SAFE = {"write_whole", "write_whole_folder"}

#: Calls that only tell others to write their own files.
OTHERS = {"logger.save"}  # of Lightning

#: Modules that are not looked into, and why files are whole there.
THEMSELVES = {
    "files.py": "it has write_whole",
    "saving/formats.py": "save_acu gives these writers, one for each format, to write_whole",
    "saving/card.py": "save_pretrained calls it from within write_whole_folder",
    "export.py": "exporters write several files, to a temporary folder; each takes its place in one step",
}


def writing_calls(tree):
    """(line, name) of each call that writes a file and is not inside an argument of those."""
    safe, names = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in SAFE:
            safe |= {id(inside) for argument in node.args for inside in ast.walk(argument)}
            names |= {argument.id for argument in node.args if isinstance(argument, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            safe |= {id(inside) for inside in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in safe:
            continue
        name = ast.unparse(node.func)
        mode = [a.value for a in (*node.args[1:2], *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
        opens = name.split(".")[-1] == "open" and any(isinstance(m, str) and set(m) & set("wax+") for m in mode)
        if opens or (name.split(".")[-1] in WRITERS and name not in OTHERS):
            yield node.lineno, name


def test_the_package_writes_files_by_write_whole():
    found = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    assert set(THEMSELVES) <= set(found)
    calls = {
        name: [(line, call) for line, call in writing_calls(ast.parse(path.read_text()))]
        for name, path in found.items()
        if name not in THEMSELVES
    }
    assert {name: lines for name, lines in calls.items() if lines} == {}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("path.write_text('a')", 1),
        ("open(path, 'w')", 1),
        ("Path(path).open(mode='ab')", 1),
        ("torch.save(state, path)", 1),
        ("open(path)", 0),
        ("write_whole(path, lambda draft: draft.write_text('a'))", 0),
        ("def write(draft):\n    torch.save(state, draft)\nwrite_whole(path, write)", 0),
        ("def write(draft):\n    torch.save(state, draft)\nother(path, write)", 1),
        ("def write(folder):\n    torch.save(state, folder / 'a')\nwrite_whole_folder(path, write)", 0),
    ],
)
def test_the_check_sees_what_it_should(code, found):
    assert len(list(writing_calls(ast.parse(code)))) == found
