"""Execute notebooks one after the other in one kernel, so that torch and transformers are imported once.

    python -m tests.support.run_notebooks FOLDER NOTEBOOK... < CODE

CODE goes into a cell behind the one that is tagged "parameters". Notebooks with their outputs are written into FOLDER, where
they also run. It is a process of its own: clients of kernels leave sockets open, and where tests run that is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient


def main(folder: Path, paths: list[Path], code: str) -> None:
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(folder))
    try:
        for path in paths:
            notebook = nbformat.read(path, as_version=4)
            (at,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
            notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(code))
            NotebookClient(notebook, km=manager, timeout=300).execute()
            nbformat.write(notebook, folder / path.name)
    finally:
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]], sys.stdin.read())
