"""The system-call filter around model-written code, as a compiled BPF program for Linux on x86-64 and aarch64.

It is the second wall, not the first: files, signals and network ports are Landlock's or the namespaces' business. What
stands here is what those leave open to a process that runs under the user's own id: sockets of every family, other
processes' limits, priority and affinity, the mode, owner, times and attributes of files that it may not even read,
kernel objects that outlive it, and interfaces of the kernel that no program of ours needs.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Sequence

# name: (x86-64, aarch64); None where the architecture has no such call.
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # Sockets: none at all. Connected pairs stay, which asyncio and multiprocessing use within one program, but pass no
    # open files: one that is under way is nobody's, and what it holds is not seen.
    "socket": (41, 198),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    # what outlives a process, or holds memory that belongs to none
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # other processes of the same user, which Landlock does not scope
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "kcmp": (312, 272),
    # what happens to files outside (Landlock does not hide that)
    "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262),
    # interfaces that reach deep into the kernel
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "chroot": (161, 51),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    # Mounts and namespaces, and other processes' memory: what supervises a program needs these itself, so they are
    # refused only to the program (`_PROGRAM_ONLY`).
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "unshare": (272, 97),
    "setns": (308, 268),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "personality": (135, 92),
    # Modes, owners, times, attributes: the owner of a file may change them under Landlock wherever the file is. They
    # do nothing and say that they did, because shutil.copy and the like set modes as a matter of course (`_QUIET`).
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    # judged by their arguments
    "socketpair": (53, 199),
    "clone": (56, 220),
    "clone3": (435, 435),
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
    "mmap": (9, 222),
}
_NAMES = list(_NUMBERS)
_PROGRAM_ONLY = _NAMES[_NAMES.index("mount") : _NAMES.index("chmod")]
_QUIET = _NAMES[_NAMES.index("chmod") : _NAMES.index("socketpair")]
_REFUSED = _NAMES[: _NAMES.index("mount")]

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of _NUMBERS, AUDIT_ARCH_*
_STREAM = 1  # SOCK_STREAM
_X32_BIT = 0x40000000  # x86-64's second numbering of the same calls
_SHARED_ANONYMOUS = 0x21  # MAP_SHARED | MAP_ANONYMOUS
_HUGE_PAGES = 0x40000  # MAP_HUGETLB
_THREAD_WITH_FILES, _THREAD = 0x10400, 0x10000  # CLONE_THREAD with and without CLONE_FILES
_NAMESPACES = 0x7E020080  # CLONE_NEW{USER,PID,NET,IPC,UTS,CGROUP,NS,TIME}

_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06  # BPF opcodes, 32-bit operands
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
# struct seccomp_data, low halves
_AT_NUMBER, _AT_ARCHITECTURE, _AT_ARGUMENT_0, _AT_ARGUMENT_1, _AT_ARGUMENT_3 = 0, 4, 16, 24, 40


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def supported() -> bool:
    """Whether this machine's system calls are known here."""
    return platform.machine() in _ARCHITECTURES


def program_filter(supervised: bool) -> bytes:
    """The filter as an array of `struct sock_filter`.

    `supervised` leaves out what a supervisor in the same process tree needs and refuses to the program itself.
    Raises ValueError on another architecture.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise ValueError(f"the sandbox knows the system calls of {', '.join(_ARCHITECTURES)}, not of {machine}")
    column, architecture = _ARCHITECTURES[machine]

    def numbers(names: Sequence[str]) -> list[int]:
        return [number for name in names if (number := _NUMBERS[name][column]) is not None]

    refuse = _instruction(_RETURN, _ERRNO | errno.EPERM)
    missing = _instruction(_RETURN, _ERRNO | errno.ENOSYS)
    done = _instruction(_RETURN, _ERRNO)
    code = [
        _instruction(_LOAD, _AT_ARCHITECTURE),
        _instruction(_EQUAL, architecture, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _AT_NUMBER),
    ]
    if machine == "x86_64":
        code += [_instruction(_AT_LEAST, _X32_BIT, 0, 1), missing]
    for number in numbers(_REFUSED + ([] if supervised else _PROGRAM_ONLY)):
        code += [_instruction(_EQUAL, number, 0, 1), refuse]
    for number in numbers(_QUIET):
        code += [_instruction(_EQUAL, number, 0, 1), done]
    # clone3's flags lie in memory, where a filter cannot look: without it the C library takes clone.
    for number in numbers(["clone3"]):
        code += [_instruction(_EQUAL, number, 0, 1), missing]
    # A pair of datagram sockets could be turned to another address; one of streams cannot.
    for number in numbers(["socketpair"]):
        code += [
            _instruction(_EQUAL, number, 0, 5),
            _instruction(_LOAD, _AT_ARGUMENT_1),
            _instruction(_AND, 0xF),
            _instruction(_EQUAL, _STREAM, 1, 0),
            refuse,
            _instruction(_RETURN, _ALLOW),
        ]
    # Limits and affinity of the caller itself (process 0) only.
    for number in numbers(["prlimit64", "sched_setaffinity"]):
        code += [
            _instruction(_EQUAL, number, 0, 4),
            _instruction(_LOAD, _AT_ARGUMENT_0),
            _instruction(_EQUAL, 0, 1, 0),
            refuse,
            _instruction(_RETURN, _ALLOW),
        ]
    # Shared memory without a file stays whole while one page of it is mapped, so no look at a process tells its size;
    # huge pages are in no process's count either.
    for number in numbers(["mmap"]):
        code += [
            _instruction(_EQUAL, number, 0, 7),
            _instruction(_LOAD, _AT_ARGUMENT_3),
            _instruction(_ANY_BIT, _HUGE_PAGES, 0, 1),
            refuse,
            _instruction(_AND, _SHARED_ANONYMOUS),
            _instruction(_EQUAL, _SHARED_ANONYMOUS, 0, 1),
            refuse,
            _instruction(_RETURN, _ALLOW),
        ]
    # A thread that shares no open files would have some that its process does not show; namespaces are refused.
    for number in numbers(["clone"]):
        code += [
            _instruction(_EQUAL, number, 0, 5 if supervised else 6),
            _instruction(_LOAD, _AT_ARGUMENT_0),
            *([] if supervised else [_instruction(_ANY_BIT, _NAMESPACES, 3, 0)]),
            _instruction(_AND, _THREAD_WITH_FILES),
            _instruction(_EQUAL, _THREAD, 1, 0),
            _instruction(_RETURN, _ALLOW),
            refuse,
        ]
    return b"".join([*code, _instruction(_RETURN, _ALLOW)])


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def install(filter_program: bytes) -> None:
    """Put this process and all that it will start under `filter_program`, for good. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(filter_program, len(filter_program))
    program = _Program(len(filter_program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, mode_filter, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the system-call filter could not be installed")


def drop_capabilities() -> None:
    """Take every capability from this process and what it starts, so that root is one more user. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    drop_from_bounding_set, ambient, ambient_clear, version_3 = 24, 47, 4, 0x20080522
    for capability in range(64):
        libc.prctl(drop_from_bounding_set, capability, 0, 0, 0)  # needs CAP_SETPCAP; without it there is none to lose
    libc.prctl(ambient, ambient_clear, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(version_3, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "the capabilities could not be dropped")
