"""Execute notebooks from a fresh kernel, top to bottom, and write their outputs back, clean.

    python tools/execute.py                      all notebooks
    python tools/execute.py 05 20_matcher '5*'   some: number, name or glob
    python tools/execute.py --all 71_speed       with the cells flagged slow, gpu or data
    python tools/execute.py --no-write '5*'      run only; the notebook files stay as they are

A flagged cell that is passed over keeps the outputs it has. A notebook is written only if all of it ran.
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm

import notebooks

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Client(NotebookClient):
    "Runs the cells that are not to be skipped, and tells the progress bar."

    def __init__(self, nb, skipped: set[int], bar: tqdm, **kw):
        super().__init__(nb, **kw)
        self.skipped, self.bar, self.at = skipped, bar, 0

    def create_kernel_manager(self):
        "This very interpreter as kernel, whatever kernels the user has installed by the name python3."
        self.km = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        return self.km

    async def async_execute_cell(self, cell, cell_index, *args, **kw):
        "As the parent's, except for the cells to skip."
        self.at = cell_index
        if cell.cell_type != "code" or cell_index in self.skipped: return cell
        await super().async_execute_cell(cell, cell_index, *args, **kw)
        self.bar.update()
        return cell


def kernel_env(root: Path, scratch: str) -> dict[str, str]:
    "Environment of a kernel: the checkout first on the path, no settings of the user's, and one thread, so that sums repeat."
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    ours = {"PYTHONPATH": path, "IPYTHONDIR": scratch}
    given = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # set, it would keep pictures out of the outputs
    return {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "TQDM_DISABLE": "1", **given, **ours}


def story(path: Path, client: Client, error: Exception) -> str:
    "What a person needs to mend a failing cell: notebook, cell, its source, and the end of the traceback."
    cell = client.nb.cells[client.at]
    head = f"{path.name}: cell {client.at} (id {cell.id}) failed"
    lines = cell.source.splitlines() or [""]
    source = "\n".join(f"    {i:3} | {line}" for i, line in enumerate(lines, 1))
    if isinstance(error, CellTimeoutError): why = "It ran longer than --timeout allows."
    elif isinstance(error, DeadKernelError): why = "Its kernel died (out of memory?)."
    else: why = "\n".join(line for o in cell.get("outputs", []) for line in o.get("traceback", [])) or str(error)
    why = _COLOUR.sub("", why)[-4000:]
    return f"{head}\n{source}\n\n{why}"


async def run_one(path: Path, args: argparse.Namespace, bar: tqdm, env: dict[str, str], flags: set[str], stop) -> str | None:
    "Execute one notebook; the story of its failure, or None."
    before, nb = path.read_bytes(), notebooks.read(path)
    skipped = {i for i, c in enumerate(nb.cells) if c.cell_type == "code" and notebooks.is_skipped(c.source, flags)}
    client = Client(nb, skipped, bar, timeout=args.timeout, extra_arguments=["--log-level=50"], resources={"metadata": {"path": str(path.parent)}})
    client.on_notebook_start = lambda **_: own_interrupts(stop)
    start = time.monotonic()
    bar.set_postfix_str(path.stem)
    try: await client.async_execute(env=env)
    except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError) as error: return story(path, client, error)
    finally: own_interrupts(stop)
    ran = sum(c.cell_type == "code" for c in nb.cells) - len(skipped)
    if not args.no_write and path.read_bytes() != before: return f"{path.name}: was changed while it ran, so nothing is written; execute it again"
    changed = "" if args.no_write else ", written" if notebooks.write(nb, path) else ", as before"
    bar.write(f"{path.stem:32} {ran:3} cells {time.monotonic() - start:7.1f} s{changed}")
    return None


def own_interrupts(stop) -> None:
    "nbclient's own handler ends a kernel and goes on; here Ctrl-C ends the whole run, kernels first."
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError):                            # Windows
        for name in (signal.SIGINT, signal.SIGTERM): loop.add_signal_handler(name, stop)


async def tick(bar: tqdm) -> None:
    "Keep the clock of the bar going while a cell takes its time."
    while True:
        await asyncio.sleep(1)
        bar.refresh()


async def run_all(paths: list[Path], args: argparse.Namespace) -> list[str]:
    "Execute all notebooks, at most `args.jobs` at once; the stories of the failures."
    flags = set() if args.all else set(notebooks.settings(args.root)["tst_flags"].split())
    cells = [c for p in paths for c in notebooks.read(p).cells if c.cell_type == "code" and not notebooks.is_skipped(c.source, flags)]
    turn = asyncio.Semaphore(args.jobs)
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=len(cells), unit="cell", desc="notebooks", dynamic_ncols=True, disable=None) as bar:
        env, stop = kernel_env(args.root, scratch), asyncio.current_task().cancel

        async def in_turn(path: Path) -> str | None:
            async with turn: return await run_one(path, args, bar, env, flags, stop)
        clock = asyncio.create_task(tick(bar))
        try: stories = await asyncio.gather(*map(in_turn, paths))
        finally: clock.cancel()
    return [s for s in stories if s]


def main() -> int:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", metavar="NB", help="number, name or glob; all notebooks if none is given")
    parser.add_argument("--all", action="store_true", help="run flagged cells too (slow, gpu, data)")
    parser.add_argument("--no-write", action="store_true", help="leave the notebook files as they are")
    parser.add_argument("--root", type=Path, default=notebooks.ROOT, help="checkout to work in (default: this one)")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at once (default: 1)")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds that one cell may take (default: 1800)")
    args = parser.parse_args()
    if args.jobs < 1: parser.error("--jobs must be at least 1")
    try: stories = asyncio.run(run_all(notebooks.select(args.notebooks, args.root), args))
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("\nStopped; notebooks that had not finished are as they were.", file=sys.stderr)
        return 130
    for text in stories: print(f"\n{text}", file=sys.stderr)
    if stories: print(f"\n{len(stories)} notebook(s) failed.", file=sys.stderr)
    return bool(stories)


if __name__ == "__main__": sys.exit(main())
