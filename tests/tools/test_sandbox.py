"""The sandbox as its users see it: results, files, languages, limits, the pool, and workers that die."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import qwench.tools.sandbox as sandbox_module
from qwench.tools import seccomp
from qwench.tools.languages import LANGUAGES, language
from qwench.tools.leftovers import descendants, remove_tree
from qwench.tools.sandbox import Program, Sandbox, SandboxLimits, SandboxUnavailable


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxLimits(cpu_s=2, wall_s=30, memory_mb=512), workers=2) as made:
        yield made


def test_a_program_and_its_result(sandbox: Sandbox):
    result = sandbox.run("import sys\nprint(input() + '!')\nprint('wrong', file=sys.stderr)", stdin="höi")
    assert (result.status, result.stdout, result.stderr, result.exit_code) == ("ok", "höi!\n", "wrong\n", 0)
    assert 0 < result.cpu_s <= 2
    assert result.wall_s > 0
    assert result.files == {}
    assert result.detail == ""
    result = sandbox.run("print('before')\nraise KeyError('x')")
    assert (result.status, result.exit_code, result.stdout) == ("error", 1, "before\n")
    assert result.detail == "exit code 1: KeyError: 'x'"
    assert 'File "' in result.stderr
    assert "main.py" in result.stderr
    assert sandbox.run("exit(3)").exit_code == 3
    assert sandbox.run("raise SystemExit").status == "ok"


def test_the_standard_library_works_and_packages_are_not_there(sandbox: Sandbox):
    result = sandbox.run(
        "import asyncio, concurrent.futures, ctypes, decimal, hashlib, multiprocessing, sqlite3, ssl, subprocess, sys\n"
        "import tempfile, threading, zoneinfo, shutil, datetime, random, lzma, bz2\n"
        "async def f(): await asyncio.sleep(0); return 1\n"
        "assert asyncio.run(f()) == 1\n"
        "with tempfile.TemporaryDirectory() as d:\n"
        "    open(d + '/a', 'w').write('x'); shutil.copy(d + '/a', d + '/b'); shutil.copystat(d + '/a', d + '/b')\n"
        "assert subprocess.run([sys.executable, '-c', 'print(5)'], capture_output=True).stdout == b'5\\n'\n"
        "ours, theirs = multiprocessing.Pipe()\n"  # its locks and pools need /dev/shm, which is not given
        "p = multiprocessing.get_context('fork').Process(target=theirs.send, args=(7,)); p.start(); p.join()\n"
        "assert ours.recv() == 7\n"
        "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "sqlite3.connect(':memory:').execute('select 1')\n"
        "print(len(list(sys.path)), datetime.datetime.now().astimezone().utcoffset())\n"
        "try: import numpy\n"
        "except ImportError: print('no packages')\n"
    )
    assert result.status == "ok", result
    assert result.stdout.splitlines()[0] == "thread"
    assert result.stdout.splitlines()[-1] == "no packages"


def test_files_go_in_and_come_out(sandbox: Sandbox):
    given = {"data/in.txt": "seven", "helper.py": "value = 6", "raw.bin": b"\x00\xff"}
    result = sandbox.run(
        "import helper, os\n"
        "print(open('data/in.txt').read(), helper.value, open('raw.bin', 'rb').read())\n"
        "open('data/out.txt', 'w').write('new'); open('raw.bin', 'wb').write(b'changed')\n"
        "os.makedirs('a/b'); open('a/b/c', 'w').write('deep'); open('empty', 'w')",
        files=given,
    )
    assert result.stdout == "seven 6 b'\\x00\\xff'\n", result
    assert result.files == {"a/b/c": b"deep", "data/out.txt": b"new", "empty": b"", "raw.bin": b"changed"}
    for name in ("../x", "/etc/x", "", "a/../../x", "a\0b"):
        with pytest.raises(ValueError, match="relative path"):
            sandbox.run("", files={name: ""})
    with pytest.raises(ValueError, match=r"main\.py is the program itself"):
        sandbox.run("", files={"main.py": ""})


def test_files_of_holes_are_not_read(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    """Files too large for what may still come back are left, unread: they take no room, but a program may make many."""
    sizes: list[int] = []
    real = os.fdopen

    def fdopen(descriptor: int, mode: str):
        sizes.append(os.fstat(descriptor).st_size)
        return real(descriptor, mode)

    monkeypatch.setattr(sandbox_module.os, "fdopen", fdopen)
    code = "for n in range(9):\n    with open(f'{n}', 'wb') as f: f.truncate(900_000)\n"
    files = sandbox.run(code, limits=SandboxLimits(file_mb=1)).files
    assert [len(content) for content in files.values()] == [900_000]
    assert sum(sizes) < 2 << 20


def test_nothing_is_carried_from_one_program_to_the_next(sandbox: Sandbox):
    """Neither files nor modules nor anything else: each is a new process in a new directory."""
    assert sandbox.run("import builtins\nbuiltins.leak = 1\nopen('left', 'w').write('x')").files == {"left": b"x"}
    for _ in range(sandbox.workers + 1):
        result = sandbox.run("import os\nprint(os.listdir('.'), 'leak' in dir(__builtins__))")
        assert result.stdout == "['main.py'] False\n"
    first, second = (sandbox.run("print({'a', 'b', 'c', 'd'})").stdout for _ in range(2))
    assert first == second  # the same order of hashes


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        ("python", "print(6 * 7)", "42\n"),
        ("javascript", "console.log(6 * 7, require('fs').readFileSync('x', 'utf8'))", "42 here\n"),
        ("bash", "cat x | tr a-z A-Z; echo; echo $((6 * 7))", "HERE\n42\n"),
        ("perl", "print 6 * 7, qq(\\n);", "42\n"),
    ],
)
def test_languages(sandbox: Sandbox, name: str, source: str, told: str):
    if LANGUAGES[name].find() is None:
        pytest.skip(f"no {name} here")
    result = sandbox.run(source, language=name, files={"x": "here"})
    assert (result.status, result.stdout, result.stderr) == ("ok", told, ""), result


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_javascript_is_confined_and_limited_too(sandbox: Sandbox, tmp_path: Path):
    (tmp_path / "secret").write_text("outside")
    result = sandbox.run(
        f"const fs = require('fs');\n"
        f"for (const path of ['{tmp_path}/secret', '/etc/shadow', '/proc/self/environ'])\n"
        "  try { console.log('ESCAPED', fs.readFileSync(path, 'utf8')); } catch (e) { }\n"
        "try { fs.chmodSync('/etc/passwd', 0o777); } catch (e) { }\n"
        "try { console.log('ESCAPED', require('child_process').execFileSync('/bin/ls')); } catch (e) { }\n"
        "require('net').connect(80, '127.0.0.1').on('error', e => console.log('no network'));",
        language="javascript",
    )
    assert (result.status, result.stdout) == ("ok", "no network\n"), result
    small = SandboxLimits(cpu_s=0.5, memory_mb=192)
    assert sandbox.run("while (true) {}", language="javascript", limits=small).status == "timeout"
    small = SandboxLimits(cpu_s=9, memory_mb=192)
    code = "const a = []; while (true) a.push(new Array(1e6).fill(a.length));"
    hog = sandbox.run(code, language="javascript", limits=small)
    assert hog.status == "memory", hog


def test_unknown_and_missing_languages_are_refused(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="runs python, javascript, bash, perl, not 'cobol'"):
        sandbox.run("", language="cobol")
    row = dataclasses.replace(LANGUAGES["javascript"], name="missing", find=lambda: None)
    monkeypatch.setitem(LANGUAGES, "missing", row)
    with pytest.raises(ValueError, match=r"missing programs need .* not on this machine: install Node"):
        language("missing")
    with pytest.raises(ValueError, match="not on this machine"):
        sandbox.run_many(["print(1)", Program("", language="missing")])


def test_many_come_back_in_order_whatever_happens_to_some(sandbox: Sandbox):
    programs: list[str | Program] = [f"print({number})" for number in range(12)]
    programs[3] = Program("while True: pass", limits=SandboxLimits(cpu_s=0.3))
    programs[5] = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    programs[7] = Program("import sys\nsys.stdout.write('x' * 100_000)", limits=SandboxLimits(output_bytes=1000))
    programs[9] = Program("x = bytearray(1 << 30)", limits=SandboxLimits(memory_mb=128))
    results = sandbox.run_many(programs)
    assert [results[i].status for i in (3, 5, 7, 9)] == ["timeout", "error", "output", "memory"], results
    assert results[7].stdout == "x" * 1000
    for number in {*range(12)} - {3, 5, 7, 9}:
        assert (results[number].status, results[number].stdout) == ("ok", f"{number}\n")
    assert sandbox.run_many([]) == []


def test_a_lost_worker_loses_no_result(sandbox: Sandbox):
    """Every worker is killed while programs run: the programs run again in new ones, in order."""
    programs = [f"import time\ntime.sleep(0.3)\nprint({number})" for number in range(6)]
    sandbox.run_many(["", ""])
    killed: list[int] = []

    def kill() -> None:
        time.sleep(0.45)
        for worker in list(sandbox._started):
            os.kill(worker.process, signal.SIGKILL)
            killed.append(worker.process)

    killer = threading.Thread(target=kill)
    killer.start()
    results = sandbox.run_many(programs)
    killer.join()
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(6)], results
    assert killed
    assert not {worker.process for worker in sandbox._started} & set(killed)
    assert not any(Path(f"/proc/{process}").exists() for process in killed)


def test_a_worker_that_keeps_dying_is_told(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    real = sandbox_module._Worker.ask

    def die(self: sandbox_module._Worker, request: dict[str, object]) -> dict[str, object]:
        os.kill(self.process, signal.SIGKILL)
        return real(self, request)

    monkeypatch.setattr(sandbox_module._Worker, "ask", die)
    result = sandbox.run("print(1)")
    assert result.status == "killed"
    assert "worker was lost" in result.detail
    monkeypatch.undo()
    assert sandbox.run("print(1)").stdout == "1\n"


def test_nothing_outlives_a_killed_user(tmp_path: Path):
    """The process that holds the sandbox is killed in the middle of a program: workers, programs and files go."""
    code = (
        "import os, threading, time\nfrom pathlib import Path\n"
        "from qwench.tools.sandbox import Sandbox\n"
        f"s = Sandbox(workers=2, scratch=Path({str(tmp_path)!r}))\n"
        "programs = ['import os, time\\nos.fork() or os.setsid()\\ntime.sleep(60)'] * 2\n"
        "threading.Thread(target=s.run_many, args=(programs,)).start()\n"
        "while sum(len(list(w.directory.iterdir())) for w in list(s._started)) < 2: time.sleep(0.01)\n"
        "time.sleep(0.3)\nprint(*[w.process for w in s._started], flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        try:
            workers = [int(word) for word in user.stdout.readline().split()]
            below = {process for worker in workers for process in descendants(worker)}
        finally:
            user.kill()
    assert len(workers) == 2
    assert len(below) >= 4
    end = time.monotonic() + 20
    while time.monotonic() < end and (
        any(Path(f"/proc/{process}").exists() for process in [*workers, *below]) or list(tmp_path.iterdir())
    ):
        time.sleep(0.02)
    assert [process for process in [*workers, *below] if Path(f"/proc/{process}").exists()] == []
    assert list(tmp_path.iterdir()) == []


def test_it_can_be_used_from_many_threads(sandbox: Sandbox):
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda n: sandbox.run(f"print({n})"), range(16)))
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(16)]
    assert len(sandbox._started) <= sandbox.workers


def test_closing(tmp_path: Path):
    made = Sandbox(workers=1, scratch=tmp_path)
    made.run("")
    made.close()
    made.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        made.run("")


def test_more_can_be_made_readable(tmp_path: Path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "data").write_text("to read")
    with Sandbox(workers=1, readable=[tmp_path / "package"]) as made:
        path = str(tmp_path / "package" / "data")
        assert made.run(f"print(open({path!r}).read())").stdout == "to read\n"
        assert made.run(f"open({path!r}, 'w')").status == "error"
    with pytest.raises(FileNotFoundError):
        Sandbox(workers=1, readable=[tmp_path / "none"])


def test_bad_limits_and_numbers_of_workers():
    for name in ("cpu_s", "wall_s", "memory_mb", "processes", "output_bytes", "file_mb"):
        with pytest.raises(ValueError, match=f"{name} of the sandbox's limits must be more than 0, not 0"):
            SandboxLimits(**{name: 0})
    with pytest.raises(ValueError, match="workers"):
        Sandbox(workers=-1)


def test_without_a_confinement_nothing_runs(monkeypatch: pytest.MonkeyPatch):
    """Neither tool: a refusal that says what to install, and no process is started."""
    sandbox_module._confinement.cache_clear()
    monkeypatch.setitem(sys.modules, "sandlock", None)
    monkeypatch.setattr(sandbox_module.shutil, "which", lambda name: None)
    monkeypatch.setattr(sandbox_module.subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    try:
        with pytest.raises(
            SandboxUnavailable, match=r"(?s)sandlock: not installed.*bubblewrap: bwrap is not.*pip install"
        ):
            Sandbox()
    finally:
        sandbox_module._confinement.cache_clear()


def test_a_confinement_that_does_not_hold_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The trial run decides, not the presence of a tool: here one that confines nothing."""
    fake = tmp_path / "bwrap"
    fake.write_text(
        '#!/bin/sh\nwhile [ "$1" != -- ]; do\n  [ "$1" = --chdir ] && cd "$2"\n  shift\ndone\nshift\nexec "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sandbox_module._confinement.cache_clear()
    try:
        with pytest.raises(SandboxUnavailable, match=r"does not hold here: .*a file outside is readable"):
            Sandbox(confinement="bubblewrap")
    finally:
        sandbox_module._confinement.cache_clear()


def test_a_hostile_tree_is_removed(tmp_path: Path):
    """Deeper than a path may be long, directories without rights, links to what must stay, odd names."""
    (tmp_path / "stays").mkdir()
    (tmp_path / "stays" / "file").write_text("x")
    root = tmp_path / "tree"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "stays")
    (root / "closed").mkdir()
    (root / "closed" / "in").write_text("x")
    (root / "closed").chmod(0)
    for number in range(5):
        (root / f"{number}").write_text("x")
        (root / f"d{number}").mkdir()
    os.mkfifo(root / "\n\udcff")
    here = os.open(root, os.O_RDONLY)
    name = "deep" * 10
    for _ in range(150):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    remove_tree(root)
    assert not root.exists()
    assert (tmp_path / "stays" / "file").read_text() == "x"
    remove_tree(root)  # again: nothing there


def test_the_filter_knows_this_machine(monkeypatch: pytest.MonkeyPatch):
    whole, supervised = seccomp.program_filter(supervised=False), seccomp.program_filter(supervised=True)
    assert len(whole) % 8 == 0
    assert len(supervised) < len(whole) < 8 * 4096
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "aarch64")
    assert seccomp.program_filter(supervised=False) != whole
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
    with pytest.raises(ValueError, match="not of riscv64"):
        seccomp.program_filter(supervised=False)


def test_a_killed_program_is_told_as_killed(sandbox: Sandbox):
    """sandlock gives SIGKILL no number; the kernel's limit on processor time ends programs with it."""
    result = sandbox.run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert (result.status, result.exit_code) == ("error", -signal.SIGKILL)
    assert result.detail == "ended by signal 9"
