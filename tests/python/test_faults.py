"""A rank process is killed, or stopped, at a named point of a step: every survivor has a status that names it in time,
its slot is closed, it is rid of the comm at once, and the survivors go on in a new one. Nothing is left behind.

The rank processes are this file: `python test_faults.py RANK ID BACKEND POINT VICTIM SIGNAL`. Each prints a line of
JSON when its step has ended, then takes the id of the survivors' new group from standard input.
"""

import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

RANKS, EXPERTS, TOKENS, TOPK, HIDDEN = 4, 8, 4, 2, 16
TIMEOUT_MS = 2000
VICTIM = 2
BACKENDS = ["nvlink_one_sided", "allgather_reducescatter"]
# Where the fault strikes, in the third step: before dispatch SEND, after it, after RECV, after combine SEND.
POINTS = ["before", "dispatch_sent", "dispatched", "combine_sent"]
# On top of what is promised, for a machine with fewer cores than ranks.
GRACE = 2.0


class Rank:
    """One rank of a small layer whose experts give back what they get: a token comes back times its ranks."""

    def __init__(self, lib, rank, ranks, group, backend):
        import a2a_ctypes as a2a

        self.a2a, self.lib, self.rank, self.ranks = a2a, lib, rank, ranks
        config = a2a.Config(
            rank=rank, num_ranks=ranks, num_experts=EXPERTS, max_topk=TOPK, max_hidden=HIDDEN, max_tokens=TOKENS,
            token_dtype=a2a.DTYPE_F32, backend=lib.a2a_backend_from_name(backend.encode()), unique_id=group,
            setup_timeout_ms=20000, first_step_timeout_ms=TIMEOUT_MS, timeout_ms=TIMEOUT_MS,
        )
        self.comm, self.routing = ctypes.c_void_p(), ctypes.c_void_p()
        lib.a2a_create(config, self.comm)
        lib.a2a_routing_create(self.comm, 0, self.routing)
        row = ctypes.c_float * HIDDEN
        self.tokens = (row * TOKENS)(*[row(*[100 * rank + t + 1] * HIDDEN) for t in range(TOKENS)])
        pairs = [((rank + t) % EXPERTS, (rank + 3 * t + 4) % EXPERTS) for t in range(TOKENS)]
        self.ids = (ctypes.c_int32 * TOPK * TOKENS)(*[(ctypes.c_int32 * TOPK)(*p) for p in pairs])
        owners = [len({self.owner(e) for e in p}) for p in pairs]
        self.expected = [[x * n for x in token] for token, n in zip(self.tokens, owners)]
        self.back = (row * TOKENS)()
        self.rows, self.results = a2a.Tensor(), a2a.Tensor()
        self.status = (ctypes.c_int32 * (4 + ranks))()
        self.status_tensor = a2a.Tensor.of(self.status, a2a.INT32, 4 + ranks)

    def owner(self, expert):
        return [r for r in range(self.ranks) for _ in range(EXPERTS // self.ranks + (r < EXPERTS % self.ranks))][expert]

    def step(self, at=lambda point: None):
        a2a, lib = self.a2a, self.lib
        sent = a2a.DispatchIn(
            tokens=a2a.Tensor.of(self.tokens, a2a.FLOAT32, TOKENS, HIDDEN),
            topk_ids=a2a.Tensor.of(self.ids, a2a.INT32, TOKENS, TOPK), phase=1,
        )
        at("before")
        lib.a2a_dispatch(self.comm, self.routing, sent, None, None)
        at("dispatch_sent")
        received = a2a.DispatchOut(tokens=self.rows, status=self.status_tensor)
        lib.a2a_dispatch(self.comm, self.routing, a2a.DispatchIn(phase=2), received, None)
        at("dispatched")
        lib.a2a_combine_buffer(self.comm, self.routing, self.results)
        bytes_ = 4 * HIDDEN
        for size in self.rows.sizes()[:-1]:
            bytes_ *= size
        ctypes.memmove(self.results.address(), self.rows.address(), bytes_)
        lib.a2a_combine(self.comm, self.routing, a2a.CombineIn(tokens=self.results, phase=1), None, None)
        at("combine_sent")
        out = a2a.CombineOut(
            tokens=a2a.Tensor.of(self.back, a2a.FLOAT32, TOKENS, HIDDEN), status=self.status_tensor
        )
        lib.a2a_combine(self.comm, self.routing, a2a.CombineIn(phase=2), out, None)
        assert [list(token) for token in self.back] == self.expected

    def close(self):
        self.lib.a2a_routing_destroy(self.routing)
        self.lib.a2a_destroy(self.comm)


def timed(call):
    """How a call ended, and after how long."""
    begun = time.monotonic()
    try:
        call()
        text = "ok"
    except Exception as error:  # the wrapper's own: a status and its sentence
        text = str(error)
    return text, time.monotonic() - begun


def child(rank, group, backend, point, victim, number):
    import a2a_ctypes as a2a

    lib = a2a.load()
    me = Rank(lib, rank, RANKS, a2a.UniqueId.from_buffer_copy(bytes.fromhex(group)), backend)
    me.step()
    me.step()

    def strike(at):
        if at == point and rank == victim:
            os.kill(os.getpid(), number)

    text, took = timed(lambda: me.step(strike))
    status = list(me.status)
    again, again_took = timed(me.step) if text != "ok" else ("", 0.0)
    info = a2a.ErrorInfo()
    lib.a2a_get_async_error(me.comm, info)
    _, destroyed = timed(me.close)
    print(json.dumps({
        "text": text, "took": took, "status": status, "again": again, "again_took": again_took,
        "error": info.status, "lost": info.lost_ranks[0], "destroyed": destroyed,
    }), flush=True)

    # The survivors' new group: ranks close up.
    group = sys.stdin.readline().strip()
    if group:
        place = rank - (rank > victim)
        new = Rank(lib, place, RANKS - 1, a2a.UniqueId.from_buffer_copy(bytes.fromhex(group)), backend)
        print(json.dumps({"text": timed(new.step)[0]}), flush=True)
        new.close()


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "python"))
    child(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
    sys.exit()

import pytest  # noqa: E402  (the child needs none)


class Processes:
    """The rank processes of one case; all of them are gone when it ends, whatever ended it."""

    def __init__(self, lib, backend, point, number):
        import a2a_ctypes as a2a

        group = bytes(a2a.unique_id(lib)).hex()
        self.all = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), group, backend, point, str(VICTIM), str(int(number))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(RANKS)
        ]
        self.limit = threading.Timer(60, self.kill)
        self.limit.start()

    def kill(self):
        for process in self.all:
            process.kill()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.limit.cancel()
        self.kill()
        for process in self.all:
            process.communicate()

    def line(self, rank):
        text = self.all[rank].stdout.readline()
        assert text, f"rank {rank} ended without a word"
        return json.loads(text)

    def tell(self, rank, text):
        self.all[rank].stdin.write(text + "\n")
        self.all[rank].stdin.flush()


def check_survivor(name, result, promise):
    """A survivor of a step that was lost: what it was told, and how soon."""
    operation = "dispatch" if name[1] == "before" else "combine"
    statuses = ["A2A_PEER_LOST"] if name[0] == signal.SIGKILL else ["A2A_TIMEOUT"]
    text = result["text"]
    assert any(status in text for status in statuses), text
    for word in [f"{operation} on slot 0", "sequence 3", f"rank {VICTIM}"]:
        assert word in text, text
    assert result["took"] <= promise + GRACE, result
    assert result["status"][0] & 4 and result["status"][4 + VICTIM] == 1, result
    assert result["error"] == (17 if name[0] == signal.SIGKILL else 16) and result["lost"] >> VICTIM & 1, result
    assert statuses[0] in result["again"] and result["again_took"] < 0.5, result
    assert result["destroyed"] < 1.0 + GRACE, result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_is_gone(lib, backend, point, number):
    import a2a_ctypes as a2a

    survivors = [rank for rank in range(RANKS) if rank != VICTIM]
    promise = 1.0 if number == signal.SIGKILL else TIMEOUT_MS / 1000 + 1.0
    with Processes(lib, backend, point, number) as processes:
        for rank in survivors:
            result = processes.line(rank)
            if point == "combine_sent":
                # Its last flag had come: nobody misses it in this step.
                assert result["text"] == "ok", result
            else:
                check_survivor((number, point), result, promise)
        # The new group works, before and after the late rank is back and has finished its void step.
        group = bytes(a2a.unique_id(lib)).hex()
        if number == signal.SIGSTOP:
            os.kill(processes.all[VICTIM].pid, signal.SIGCONT)
            late = processes.line(VICTIM)
            assert late["text"] == "ok" or "is void" in late["text"], late
        for rank in survivors:
            processes.tell(rank, group)
        for rank in survivors:
            assert processes.line(rank) == {"text": "ok"}


def held():
    """What this process holds of the machine: descriptors, threads, windows. A thread that was joined may stand in
    /proc for a moment longer: what counts is the least within a quarter of a second."""
    return min(look() for _ in range(25))


def look():
    time.sleep(0.01)
    maps = pathlib.Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps.count("a2a-window")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_left_behind(lib, backend):
    import a2a_ctypes as a2a

    def cycle(ranks):
        group = a2a.unique_id(lib)
        failures = []

        def run(rank):
            try:
                member = Rank(lib, rank, ranks, group, backend)
                member.step()
                member.close()
            except Exception as error:
                failures.append(str(error))

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures

    cycle(RANKS)
    before = held()
    for _ in range(25):
        cycle(RANKS)
    assert held() == before
    assert before[2] == 0
