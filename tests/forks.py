"""Starts the repository's commands as forks of one process that has torch loaded: in a tenth of the time.

A fork gets arguments, environment, working directory and standard streams of its own, and does what a new Python would:
of our modules, none is there yet. Its exit code is what Python makes of how it ends.

Run as a script, this is the process that forks: it reads requests from the socket that its argument names.
"""

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import types

HANGS = 1000  # seconds, after which a process hangs for sure: no machine is so slow
SERVER = []  # the process that forks, and the socket to it


def server():
    """The socket to the process that forks, which is started by the first to ask."""
    if not SERVER:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        SERVER[:] = subprocess.Popen([sys.executable, __file__, str(its.fileno())], pass_fds=[its.fileno()],
                                     stdin=subprocess.DEVNULL, env=environment), ours
        its.close()
    return SERVER[1]


def stop():
    if SERVER:
        SERVER[1].close()
        SERVER[0].wait()


class Fork:
    """A command that was started as `subprocess.Popen` starts one, whose words it takes without the first, Python.

    stdout, stderr: files; None: kept, for `communicate`. prepare: Python source that it runs first.
    """

    def __init__(self, words, cwd, env, stdout=None, stderr=None, prepare=""):
        self.kept = [os.memfd_create("kept") for _ in range(2)]
        reader, writer = os.pipe()
        with open(os.devnull) as nothing:
            files = [nothing, stdout or self.kept[0], stderr or self.kept[1], writer]
            request = dict(words=[*map(str, words)], cwd=str(cwd), env=env, prepare=prepare)
            socket.send_fds(server(), [json.dumps(request).encode()],
                            [file if type(file) is int else file.fileno() for file in files])
        os.close(writer)
        self.answer = os.fdopen(reader, "rb", 0)
        self.pid, self.returncode = int(self.answer.readline()), None

    def wait(self):
        """Waits for its end; returns its exit code, negative if a signal has ended it."""
        if self.returncode is None:
            if not select.select([self.answer], [], [], HANGS)[0]:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError
            self.returncode = int(self.answer.readline())
            self.answer.close()
        return self.returncode

    def communicate(self):
        """Waits for its end; returns what it has written."""
        self.wait()
        texts = []
        for number in self.kept:
            os.lseek(number, 0, os.SEEK_SET)
            with os.fdopen(number) as file:
                texts.append(file.read())
        return texts


def run(*args, **options):
    """As `subprocess.run`: the finished process, with `stdout` and `stderr`."""
    fork = Fork(*args, **options)
    fork.stdout, fork.stderr = fork.communicate()
    return fork


def start_ranks(count, words, cwd, env):
    """Starts a command in `count` processes, as torchrun does, but none waits for the others: a list of `Fork`s."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count),
                      "TORCHELASTIC_RUN_ID": "none"}
    return [Fork(words, cwd, env | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


def serve(channel):
    """Forks at each request. Returns, in the fork alone, its request and the numbers of its standard streams."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        request, files, *_ = socket.recv_fds(channel, 2**20, 4)
        if not request:
            while True:  # until all have ended
                try:
                    os.wait()
                except ChildProcessError:
                    os._exit(0)
        if os.fork() == 0:  # a process that waits for the fork
            channel.close()
            pid = os.fork()
            if pid == 0:
                os.close(files.pop())
                return json.loads(request), files
            for file in files[:3]:
                os.close(file)
            os.write(files[3], b"%d\n" % pid)
            os.write(files[3], b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
        for file in files:
            os.close(file)


def become(words, cwd, env, prepare, files):
    """Makes this process a new Python that was started with these words; returns what it is to run."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 3 + 64)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    encoding = env.get("PYTHONIOENCODING")
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding=encoding, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding, "backslashreplace", closefd=False)
    exec(prepare, {})
    how, rest = (words[0], words[1:]) if words[0] in ("-m", "-c") else ("", words)
    sys.argv = [how, *rest[1:]] if how else rest
    sys.path[:1] = [os.path.dirname(rest[0]) if not how else "", *filter(None, env.get("PYTHONPATH", "").split(":"))]
    return how, rest[0]


if __name__ == "__main__":
    import matplotlib.figure  # noqa: F401 -- what nearly every command takes seconds to load
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import torch._dynamo  # noqa: F401 -- which torch's optimizers load

    gc.freeze()  # a fork need not look through what was there before
    request, files = serve(socket.socket(fileno=int(sys.argv[1])))
    how, name = become(**request, files=files)
    if how == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(name, "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        runpy.run_path(name, run_name="__main__")
