"""Programs that try to get out of the sandbox, under every confinement that this machine offers."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwench.tools.leftovers import descendants
from qwench.tools.sandbox import Confinement, Sandbox, SandboxLimits, SandboxUnavailable

LIMITS = SandboxLimits(cpu_s=0.3, wall_s=30.0, memory_mb=256, processes=8, output_bytes=50_000, file_mb=4)

# `refused(action)` prints what an escape would have returned; nothing printed is what every such program must do.
PRELUDE = """
import ctypes, errno, os, resource, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def refused(action):
    try:
        value = action()
    except (OSError, ValueError, PermissionError):
        return
    if value is not None and value != -1:
        print("ESCAPED", value)
def call(number, *arguments):
    return libc.syscall(number, *arguments)
"""


@pytest.fixture(scope="module", params=["sandlock", "bubblewrap"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    confinement: Confinement = request.param
    os.environ["QWENCH_TEST_SECRET"] = "a secret of the environment"
    try:
        made = Sandbox(LIMITS, workers=2, confinement=confinement)
    except SandboxUnavailable as error:
        if confinement == "sandlock":
            raise
        pytest.skip(str(error).partition("\n")[2])
    finally:
        del os.environ["QWENCH_TEST_SECRET"]
    with made:
        yield made
        root = made._root
    assert not root.exists()


@pytest.fixture(autouse=True)
def nothing_left(sandbox: Sandbox) -> Iterator[None]:
    """After each attack: only workers live below this process, their scratch is gone, and programs still run."""
    yield
    assert sandbox.run("print('alive')").stdout == "alive\n"
    for worker in sandbox._started:
        assert descendants(worker.process) == []
        assert list(worker.directory.iterdir()) == []
    assert [thread for thread in threading.enumerate() if thread.name.startswith("sandbox")] == []


def contained(sandbox: Sandbox, code: str, stdin: str = "") -> str:
    result = sandbox.run(PRELUDE + code, stdin=stdin)
    assert result.status == "ok", (result.status, result.detail, result.stderr)
    assert "ESCAPED" not in result.stdout, result.stdout
    return result.stdout


def test_files_outside_cannot_be_read(sandbox: Sandbox, tmp_path: Path):
    secret = tmp_path / "secret.txt"
    secret.write_text("outside")
    paths = [secret, Path("/etc/shadow"), Path("/etc/passwd"), Path.home() / ".ssh", Path.home(), Path(__file__)]
    paths += [Path(__file__).parents[2], Path("/"), Path("/tmp"), Path("/proc/1/environ"), Path("/proc/self/environ")]
    paths += [Path(f"/proc/{os.getpid()}/environ"), Path("/sys/kernel"), Path("/dev/mem"), Path("/dev/kmsg")]
    contained(
        sandbox,
        f"for path in {[str(path) for path in paths]!r}:\n"
        "    refused(lambda: open(path).read() and path)\n"
        # with namespaces the way to the scratch and to the interpreter is there, and nothing else in it
        "    refused(lambda: path if set(os.listdir(path)) - set(sys.executable.split('/') + os.__file__.split('/')\n"
        "        + ['bin', 'dev', 'etc', 'lib', 'lib64', 'usr', 'worker-1', 'worker-2']) else None)\n",
    )


def test_files_outside_cannot_be_changed(sandbox: Sandbox, tmp_path: Path):
    secret = tmp_path / "secret.txt"
    secret.write_text("outside")
    secret.chmod(0o640)
    os.utime(secret, (1, 1))
    before = secret.stat()
    contained(
        sandbox,
        f"path, other = {str(secret)!r}, {str(tmp_path / 'new')!r}\n"
        "for action in (lambda: open(path, 'w').name, lambda: open(path, 'a').name, lambda: open(other, 'x').name,\n"
        "        lambda: os.mkdir(other) or 'mkdir', lambda: os.unlink(path) or 'unlink',\n"
        "        lambda: os.rename(path, other) or 'rename', lambda: os.truncate(path, 0) or 'truncate',\n"
        "        lambda: os.symlink(path, other) or 'symlink', lambda: os.link(path, 'here') or 'link',\n"
        "        lambda: os.mkfifo(other) or 'fifo', lambda: os.rename(path, 'here') or 'rename here',\n"
        "        lambda: open('/dev/shm/x', 'w').name, lambda: open('/tmp/x', 'w').name):\n"
        "    refused(action)\n"
        # these say that they did it, and do nothing
        "for action in (lambda: os.chmod(path, 0o777), lambda: os.chown(path, 12345, 12345), lambda: os.utime(path),\n"
        "        lambda: os.setxattr(path, 'user.x', b'1')):\n"
        "    refused(action)\n",
    )
    after = secret.stat()
    kept = ("st_mode", "st_uid", "st_gid", "st_mtime", "st_size", "st_nlink")
    assert [getattr(after, name) for name in kept] == [getattr(before, name) for name in kept]
    assert os.listdir(tmp_path) == ["secret.txt"]
    assert os.listxattr(secret) == []


def test_the_interpreter_and_the_system_are_read_only(sandbox: Sandbox):
    contained(
        sandbox,
        "for path in (os.__file__, sys.executable, '/bin/sh', '/usr/lib'):\n"
        "    refused(lambda: open(path, 'ab').name)\n"
        "    refused(lambda: os.rename(path, path + '2') or path)\n",
    )


def test_links_do_not_lead_outside(sandbox: Sandbox, tmp_path: Path):
    (tmp_path / "secret.txt").write_text("outside")
    code = (
        f"os.symlink({str(tmp_path / 'secret.txt')!r}, 'file'); os.symlink({str(tmp_path)!r}, 'directory')\n"
        "os.symlink('/proc/self/root/etc/shadow', 'shadow'); os.mkdir('deep'); os.symlink('../../..', 'deep/up')\n"
        "for path in ('file', 'directory/secret.txt', 'shadow', 'deep/up/x', '../../../etc/shadow'):\n"
        "    refused(lambda: open(path).read() or path)\n"
        "    refused(lambda: open(path, 'w').name)\n"
        "os.mkfifo('pipe'); open('real', 'w').write('kept')\n"
    )
    result = sandbox.run(PRELUDE + code)
    assert (result.status, result.stdout) == ("ok", ""), result
    assert result.files == {"real": b"kept"}  # neither what the links lead to nor the pipe
    assert (tmp_path / "secret.txt").read_text() == "outside"


def test_the_environment_has_no_secrets_and_no_open_files(sandbox: Sandbox):
    told = contained(
        sandbox,
        "print(sorted(os.environ))\n"
        "def is_open(number):\n"
        "    try: os.fstat(number)\n"
        "    except OSError: return False\n"
        "    return True\n"
        "print([number for number in range(3, 4096) if is_open(number)])\n",
    )
    names, numbers = told.splitlines()
    assert "SECRET" not in names
    assert set(eval(names)) <= {
        "HOME", "TMPDIR", "PATH", "LANG", "LC_CTYPE", "TZ", "OPENSSL_CONF", "PYTHONHASHSEED", "OMP_NUM_THREADS", "PWD",
    }  # fmt: skip
    assert eval(numbers) == []


def test_no_network_of_any_kind(sandbox: Sandbox, tmp_path: Path):
    import socket

    listening = socket.create_server(("127.0.0.1", 0))
    named = socket.socket(socket.AF_UNIX)
    named.bind(str(tmp_path / "socket"))
    named.listen()
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0qwench-test-{os.getpid()}")
    abstract.listen()
    with listening, named, abstract:
        contained(
            sandbox,
            "import socket\n"
            f"port, path, name = {listening.getsockname()[1]}, {str(tmp_path / 'socket')!r},"
            f" {abstract.getsockname()!r}\n"
            "refused(lambda: socket.create_connection(('127.0.0.1', port)))\n"
            "refused(lambda: socket.create_server(('127.0.0.1', 0)))\n"
            "refused(lambda: socket.getaddrinfo('example.org', 80))\n"
            "for family in range(46):\n"
            "    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):\n"
            "        refused(lambda: socket.socket(family, kind))\n"
            "refused(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))\n"
            "refused(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))\n"
            "def connect(address):\n"
            "    with socket.socket(socket.AF_UNIX) as s: s.connect(address); return address\n"
            "refused(lambda: connect(path)); refused(lambda: connect(name))\n"
            "a, b = socket.socketpair(); a.send(b'x')\n"
            "refused(lambda: a.connect(path) or 'connected')\n"
            "assert b.recv(1) == b'x'\n",
        )


def test_other_processes_cannot_be_touched(sandbox: Sandbox):
    """Signals, tracing, memory, limits, priority and affinity of the test itself, the worker and everyone else."""
    limits, priority, affinity = (
        resource.getrlimit(resource.RLIMIT_NOFILE),
        os.getpriority(os.PRIO_PROCESS, 0),
        os.sched_getaffinity(0),
    )
    workers = [worker.process for worker in sandbox._started]
    contained(
        sandbox,
        f"others = {[os.getpid(), os.getppid(), *workers]!r} + [os.getppid(), 1, -1]\n"
        "for other in others:\n"
        "    for number in (0, signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):\n"
        "        if other == -1:\n"
        "            continue\n"
        "        if other == 1 or other == os.getppid() < 5:\n"
        "            continue  # killpg(1) is kill(-1), tested below; in a namespace of its own its parent is its own\n"
        "        refused(lambda: os.kill(other, number) or ('kill', other, number))\n"
        "        refused(lambda: os.killpg(other, number) or ('killpg', other, number))\n"
        "        refused(lambda: signal.pidfd_send_signal(os.pidfd_open(other), number) or ('pidfd', other))\n"
        "    refused(lambda: call(101, 16, other, 0, 0) + 1 or None)\n"  # PTRACE_ATTACH
        "    refused(lambda: resource.prlimit(other, resource.RLIMIT_NOFILE, (4, 4)))\n"
        "    refused(lambda: os.setpriority(os.PRIO_PROCESS, other, 19) or ('priority', other))\n"
        "    refused(lambda: os.sched_setaffinity(other, {0}) or ('affinity', other))\n"
        "    refused(lambda: open(f'/proc/{other}/mem', 'r+b').name)\n"
        "    refused(lambda: open(f'/proc/{other}/oom_score_adj', 'w').name)\n"
        "refused(lambda: os.setpriority(os.PRIO_USER, os.getuid(), 19) or 'everyone')\n",
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    assert os.getpriority(os.PRIO_PROCESS, 0) == priority
    assert os.sched_getaffinity(0) == affinity


def test_killing_everyone_kills_the_program_alone(sandbox: Sandbox):
    workers = {worker.process for worker in sandbox._started}
    result = sandbox.run("import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(os.getppid(), signal.SIGKILL)")
    assert result.status in ("ok", "error")
    assert {worker.process for worker in sandbox._started} == workers


@pytest.mark.parametrize(
    "bomb",
    [
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        # by the number of the call, past the C library
        "import ctypes, platform\nlibc = ctypes.CDLL(None)\n"
        "while True: libc.syscall(57) if platform.machine() == 'x86_64' else libc.fork()",
        # a chain: each lives a moment only and leaves one orphan
        "import os\nwhile True:\n    try:\n        if os.fork(): os._exit(0)\n        os.setsid()\n"
        "    except OSError: pass",
        "import subprocess, sys\nwhile True:\n    try: subprocess.Popen([sys.executable, __file__])\n"
        "    except OSError: pass",
    ],
    ids=["fork", "raw", "chain", "exec"],
)
def test_fork_bomb(sandbox: Sandbox, bomb: str):
    result = sandbox.run(bomb)
    assert result.status in ("timeout", "killed", "memory", "error", "ok"), result
    assert result.cpu_s < 10 * LIMITS.cpu_s


def test_thread_bomb(sandbox: Sandbox):
    result = sandbox.run(
        "import threading, time\nthreading.stack_size(32768)\n"
        "while True:\n    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    )
    assert result.status in ("killed", "error", "memory"), result


@pytest.mark.parametrize(
    "hog",
    [
        "x = bytearray(1 << 30)",
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "import mmap\nx = []\nwhile True:\n    m = mmap.mmap(-1, 1 << 24, mmap.MAP_PRIVATE)\n"
        "    m.write(bytes(1 << 24))\n    x.append(m)",
        "import os\nfor _ in range(2): os.fork()\nx = b'x' * (100 << 20)\nimport time\ntime.sleep(9)",
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.malloc.restype = ctypes.c_void_p\n"
        "while True:\n    p = libc.malloc(1 << 24)\n    assert p, 'MemoryError'\n    ctypes.memset(p, 1, 1 << 24)",
    ],
    ids=["one", "many", "mapped", "children", "malloc"],
)
def test_memory(sandbox: Sandbox, hog: str):
    result = sandbox.run(hog, limits=dataclasses.replace(LIMITS, cpu_s=5.0))
    assert result.status == "memory", result


def test_memory_behind_a_first_thread_that_ended(sandbox: Sandbox):
    """What /proc tells of a process is its first thread's, which is nothing once that has ended and others go on."""
    result = sandbox.run(
        PRELUDE + "import platform, threading\n"
        "def hog():\n"
        "    time.sleep(0.3)\n"  # until that is so
        "    x = bytes([1]) * (120 << 20)\n"
        "    time.sleep(60)\n"
        "for _ in range(3):\n"
        "    if not os.fork(): break\n"
        "threading.Thread(target=hog).start()\n"
        "call(60 if platform.machine() == 'x86_64' else 93, 0)\n",  # exit, of this thread alone
        limits=dataclasses.replace(LIMITS, cpu_s=5.0),
    )
    assert result.status == "memory", result


def test_memory_that_no_look_would_find(sandbox: Sandbox):
    """Shared memory of which one page stays mapped, huge pages, and files on their way between two sockets."""
    contained(
        sandbox,
        "import array, mmap, socket\n"
        "refused(lambda: mmap.mmap(-1, 1 << 20))\n"
        "refused(lambda: mmap.mmap(-1, 1 << 21, mmap.MAP_PRIVATE | 0x40000))\n"
        "a, b = socket.socketpair()\n"
        "file = os.open('x', os.O_RDWR | os.O_CREAT)\n"
        "refused(lambda: a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [file]))]))\n"
        # a thread with open files of its own; the call must not return twice
        "if os.uname().machine == 'x86_64' and call(56, 0x10900, 0, 0, 0, 0) != -1: print('ESCAPED', 'thread')\n",
    )


def test_files_that_are_only_mapped(sandbox: Sandbox):
    """A megabyte each, of which one page is mapped; neither named nor open."""
    result = sandbox.run(
        "import mmap, os, time\n"
        "kept = []\n"
        "while True:\n"
        "    file = os.open('x', os.O_RDWR | os.O_CREAT)\n"
        "    os.unlink('x')\n"
        "    os.write(file, bytes(1 << 20))\n"
        "    first = os.open('.', os.O_RDONLY)\n"  # the number that the mapping's own copy gets is the next
        "    kept.append(mmap.mmap(file, 4096, prot=mmap.PROT_READ))\n"
        "    os.close(file)\n"
        "    os.close(first)\n"
        "    os.close(first + 1)\n"
        "    time.sleep(0.002)\n",
        limits=dataclasses.replace(LIMITS, cpu_s=5.0),
    )
    assert (result.status, result.detail) == ("killed", "files that are neither named nor open"), result


def test_files_of_a_process_that_hides_them(sandbox: Sandbox):
    """Nobody without privileges may look at a process that is not "dumpable", which one may say of itself."""
    result = sandbox.run(
        PRELUDE + "libc.prctl(4, 0, 0, 0, 0)\n"
        "kept = []\n"
        "while len(kept) < 100:\n"
        "    kept.append(open('x', 'wb', buffering=0))\n"
        "    os.unlink('x')\n"
        "    kept[-1].write(bytes(1 << 20))\n"
        "    time.sleep(0.002)\n"
        "time.sleep(60)\n",
        limits=dataclasses.replace(LIMITS, cpu_s=5.0),
    )
    assert result.status == "killed", result


@pytest.mark.parametrize(
    "loop",
    [
        "while True: pass",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: pass",
        "import os\nfor _ in range(3): os.fork()\nwhile True: pass",
        "int('9' * 4000) ** 10**7",
        "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    ],
    ids=["plain", "ignores-signals", "children", "in-c", "regex"],
)
def test_endless_loop(sandbox: Sandbox, loop: str):
    result = sandbox.run(loop)
    assert result.status in ("timeout", "memory"), result
    assert "processor" in result.detail or result.status == "memory"
    assert 0.9 * LIMITS.cpu_s < result.cpu_s < 10 * LIMITS.cpu_s


def test_sleeping_and_waiting_end_by_the_wall_limit(sandbox: Sandbox):
    short = SandboxLimits(cpu_s=1, wall_s=0.3, memory_mb=256, processes=8)
    for program in (
        "import time\ntime.sleep(60)",
        "import signal\nwhile True: signal.pause()",
        "import os\nos.read(os.pipe()[0], 1)",
    ):
        result = sandbox.run(program, limits=short)
        assert (result.status, result.exit_code) == ("timeout", -signal.SIGKILL)
        assert result.wall_s > 0.29


def test_a_stopped_program_ends(sandbox: Sandbox):
    short = SandboxLimits(cpu_s=1, wall_s=0.3, memory_mb=256, processes=8)
    result = sandbox.run("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", limits=short)
    assert result.wall_s < LIMITS.wall_s  # in a namespace of its own it is not stopped but goes on


@pytest.mark.parametrize(
    "filler",
    [
        "f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))",
        "n = 0\nwhile True:\n    n += 1\n    open(f'x{n}', 'wb').write(bytes(1 << 20))",
        "import os\nk = []\nwhile True:\n    f = open('x', 'wb')\n"
        "    f.write(bytes(1 << 20)); f.flush()\n    os.unlink('x'); k.append(f)",
        "import os\nos.mkdir('d', 0o300)\nn = 0\nwhile True:\n    n += 1\n"
        "    open(f'd/x{n}', 'wb').write(bytes(1 << 20))",
        "n = 0\nwhile True:\n    n += 1\n    open(f'x{n}', 'w').close()",
        "import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')",
    ],
    ids=["one-file", "files", "nameless", "hidden-directory", "many-files", "deep"],
)
def test_disk(sandbox: Sandbox, filler: str):
    result = sandbox.run(filler)
    assert result.status in ("killed", "error", "timeout"), result


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_gigabyte_of_output(sandbox: Sandbox, stream: str):
    result = sandbox.run(f"import sys\nfor _ in range(1024): sys.{stream}.write('x' * (1 << 20))")
    assert result.status == "output"
    assert len(getattr(result, stream)) == LIMITS.output_bytes


def test_a_daemon_does_not_outlive_the_program(sandbox: Sandbox):
    """The program ends, a grandchild in a session of its own stays, ignoring signals, with the pipes open."""
    started = time.monotonic()
    result = sandbox.run(
        "import os, signal, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
        "        open('daemon', 'w').write('here')\n"
        "        time.sleep(60)\n"
        "    os._exit(0)\n"
        "while not os.path.exists('daemon'): time.sleep(0.01)\n"
        "print('left')"
    )
    assert (result.status, result.stdout) == ("ok", "left\n"), result
    assert time.monotonic() - started < LIMITS.wall_s


def test_a_chain_of_orphans_does_not_outlive_the_program(sandbox: Sandbox):
    """Each forks the next and ends at once, so that nothing stands still to be killed; the program itself is done."""
    for _ in range(3):
        result = sandbox.run(
            "import os, time\n"
            "if os.fork() == 0:\n"
            "    os.setsid()\n"
            "    while True:\n"
            "        try:\n"
            "            if os.fork(): os._exit(0)\n"
            "            open('chain', 'a').close()\n"
            "        except OSError: pass\n"
            "while not os.path.exists('chain'): time.sleep(0.001)\n"
            "print('left', flush=True)\n"
            "os._exit(0)"
        )
        assert (result.status, result.stdout) == ("ok", "left\n"), result


def test_kernel_interfaces(sandbox: Sandbox):
    """Namespaces, mounts, other roots, keys, BPF, rings, perf, shared memory, raw numbers past the C library."""
    told = contained(
        sandbox,
        "import platform\n"
        "x86 = platform.machine() == 'x86_64'\n"
        "numbers = dict(unshare=(272, 97), mount=(165, 40), chroot=(161, 51), setns=(308, 268), bpf=(321, 280),\n"
        "    keyctl=(250, 219), io_uring_setup=(425, 425), perf_event_open=(298, 241), userfaultfd=(323, 282),\n"
        "    memfd_create=(319, 279), shmget=(29, 194), mq_open=(240, 180), reboot=(169, 142),\n"
        "    init_module=(175, 105),\n"
        "    ptrace=(101, 117), process_vm_readv=(310, 270), socket=(41, 198), syslog=(103, 116), fsopen=(430, 430),\n"
        "    inotify_add_watch=(254, 27), open_by_handle_at=(304, 265), swapon=(167, 224), clone3=(435, 435),\n"
        "    pivot_root=(155, 41), settimeofday=(164, 170), sethostname=(170, 161))\n"
        "for name, pair in numbers.items():\n"
        "    ctypes.set_errno(0)\n"
        "    value = call(pair[0 if x86 else 1], 0x10000000, 0, 0, 0, 0)\n"
        "    if value != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS, errno.EACCES):\n"
        "        print('ESCAPED', name, value, errno.errorcode.get(ctypes.get_errno()))\n"
        "for flag in (0x10000000, 0x20000000, 0x40000000, 0x00020000, 0x02000000):\n"
        "    if call(56 if x86 else 220, flag | 17, 0, 0, 0, 0) != -1: print('ESCAPED', 'clone', flag)\n"
        "for number in (41, 90, 57) if x86 else (): # x32's numbering of the same calls\n"
        "    child = os.fork()\n"
        "    if not child: os._exit(0 if call(0x40000000 | number, 0, 0, 0) == -1 else 1)\n"
        "    if os.waitpid(child, 0)[1] not in (0, signal.SIGSYS): print('ESCAPED', 'x32', number)\n"
        "print('done', flush=True)\n",
    )
    assert told.endswith("done\n")


def test_root_has_no_privileges_inside(sandbox: Sandbox):
    told = contained(
        sandbox,
        "import ctypes\n"
        "header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"
        "assert libc.capget(header, data) == 0\n"
        "print(list(data), libc.prctl(39, 0, 0, 0, 0))\n"  # PR_GET_NO_NEW_PRIVS
        "for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_DATA):\n"
        "    refused(lambda: resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)) or kind)\n"
        "refused(lambda: os.setuid(12345) or 'setuid' if os.getuid() != 12345 else None)\n"
        "refused(lambda: os.setgroups([0, 1]) or 'setgroups')\n"
        "refused(lambda: os.mknod('disk', 0o60666, os.makedev(8, 0)) or 'mknod')\n"
        "refused(lambda: os.nice(-5) and 'nice')\n",
    )
    assert told == "[0, 0, 0, 0, 0, 0] 1\n"


def test_other_binaries_do_not_run(sandbox: Sandbox):
    contained(
        sandbox,
        "for path in ('/bin/ls', '/usr/bin/su', '/usr/bin/passwd', '/usr/bin/mount', '/usr/bin/env', '/usr/bin/gcc'):\n"
        "    def spawn():\n"
        "        child = os.posix_spawn(path, [path], {})\n"
        "        return None if os.waitpid(child, 0)[1] else path\n"
        "    refused(spawn)\n"
        "open('own', 'w').write('#!/bin/ls\\n')\n",
    )


def test_closing_and_flooding_the_standard_streams(sandbox: Sandbox):
    result = sandbox.run("import os\nos.closerange(0, 100)\nwhile True: pass")
    assert result.status == "timeout"
    # reads none of a large input; the writer is not held up
    result = sandbox.run("print('ignored it')", stdin="x" * (4 << 20))
    assert (result.status, result.stdout) == ("ok", "ignored it\n")
    result = sandbox.run("import sys\nprint(len(sys.stdin.read()))", stdin="x" * (4 << 20))
    assert (result.status, result.stdout) == ("ok", f"{4 << 20}\n")
    result = sandbox.run("import sys\nprint(repr(sys.stdin.read()))")
    assert result.stdout == "''\n"
    contained(sandbox, "refused(lambda: os.open('/dev/tty', os.O_RDWR))\nrefused(lambda: os.write(0, b'x'))", stdin="y")


def test_signals_to_itself_and_crashes(sandbox: Sandbox):
    for program, code in (
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\nwhile True: pass", -signal.SIGSEGV),
        ("import ctypes\nctypes.string_at(0)", -signal.SIGSEGV),
        ("import os\nos.abort()", -signal.SIGABRT),
        ("import sys\nsys.exit(7)", 7),
    ):
        result = sandbox.run(program)
        if sandbox.confinement == "bubblewrap" and "os.kill" in program:
            continue
        assert (result.status, result.exit_code) == ("error", code), result


def test_programs_do_not_see_each_other(sandbox: Sandbox):
    """Eight at once, each looking for the others' scratch and processes."""
    code = (
        "import os, time\n"
        "here = os.getcwd(); open('mine', 'w').write('x'); time.sleep(0.1)\n"
        "for other in range(40):\n"
        "    for name in (f'../{other}', f'../../worker-1/{other}', f'../../worker-2/{other}'):\n"
        "        if os.path.abspath(name) == here: continue\n"
        "        for action in (lambda: os.listdir(name), lambda: open(name + '/mine').read()):\n"
        "            try: action()\n"
        "            except OSError: continue\n"
        "            print('ESCAPED', name)\n"
        "print(len(os.listdir('.')))\n"
    )
    results = sandbox.run_many([code] * 8)
    assert {result.stdout for result in results} == {"2\n"}
