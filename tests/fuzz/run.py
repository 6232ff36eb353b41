"""Fuzz readers, guided by coverage: ``python tests/fuzz/run.py READER.. [--cases N] [--keep]``; takes the extra fuzz.

Cases that reach something new are collected in build/fuzz/READER; with ``--keep``, a few of them are copied into
tests/fuzz/corpus, which tests replay. A case that is a fault ends the run, and lies in build/fuzz.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / "build" / "fuzz"
#: Of a reader, what of the collected is kept.
ENTRIES, BYTES = 24, 32_000


def fuzz(name: str, arguments: list[str]) -> None:
    """Run libFuzzer in this process, which it ends."""
    import atheris

    sys.path.insert(0, str(HERE))
    with atheris.instrument_imports(include=["v4export", "json"], enable_loader_override=False):
        import mutators
        import targets

    reader = targets.READERS[name]
    for case in reader.seeds():
        targets.run(reader, case)  # imports what is imported late
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + targets.MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if reader.prefix is not None and rng.random() < 0.7:
            made = mutators.mutated(data, reader.prefix, rng)
            if made is not None and len(made) <= most:
                return made
        return atheris.Mutate(data, most)

    atheris.Setup(
        ["fuzz", *arguments, f"-max_len={reader.most}", f"-timeout={targets.SECONDS:.0f}", "-rss_limit_mb=4096"],
        lambda case: targets.run(reader, case),
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def started(name: str, *arguments: str) -> tuple[int, str]:
    """libFuzzer in a process of its own: its exit status and what it said."""
    command = [sys.executable, str(Path(__file__).resolve()), name, "--", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return done.returncode, done.stdout


def main() -> int:
    """Each reader in turn; 1 where one has a fault."""
    if "--" in sys.argv:
        fuzz(sys.argv[1], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="+")
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from targets import CORPUS, READERS

    faults = 0
    for name in given.readers:
        collected, seeds = WORK / name, WORK / f"{name}-seeds"
        for folder in (collected, seeds, CORPUS / name):
            folder.mkdir(parents=True, exist_ok=True)
        for i, case in enumerate(READERS[name].seeds()):
            (seeds / f"seed-{i}").write_bytes(case)
        begin = time.monotonic()
        code, said = started(
            name, f"-runs={given.cases}", f"-seed={given.seed}", "-print_final_stats=1",
            f"-artifact_prefix={WORK}/{name}-", str(collected), str(seeds), str(CORPUS / name),
        )  # fmt: skip
        (WORK / f"{name}.log").write_text(said)
        done = re.search(r"number_of_executed_units: *(\d+)", said)
        peak = re.search(r"peak_rss_mb: *(\d+)", said)
        print(
            f"{name}: {done[1] if done else '?'} cases, {time.monotonic() - begin:.0f} s, "
            f"peak {peak[1] if peak else '?'} MiB, {'FAULT' if code else 'no fault'}; {WORK / name}.log",
            flush=True,
        )
        faults += bool(code)
        if given.keep and not code:
            keep(name, CORPUS / name)
    return int(bool(faults))


def keep(name: str, corpus: Path) -> None:
    """Of what was collected, a few of every size; faults that were found stay."""
    for old in corpus.glob("new-*"):
        old.unlink()
    files = sorted((WORK / name).iterdir(), key=lambda file: (file.stat().st_size, file.name))
    total = 0
    for file in files[:: -(-len(files) // ENTRIES)]:
        total += file.stat().st_size
        if total <= BYTES:
            (corpus / f"new-{file.name[:12]}").write_bytes(file.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
