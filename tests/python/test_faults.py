"""A rank process is killed, or stopped, at a named point of a step: every survivor has a status that names it in time,
its slot is closed, it is rid of the comm at once, and the survivors go on in a new one. Nothing is left behind.

The rank processes are this file: `python test_faults.py RANK ID BACKEND POINT VICTIM SIGNAL`. Each prints a line of
JSON when its step has ended, then takes the id of the survivors' new group from standard input.
"""

import gc
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

    def __init__(self, rank, ranks, group, backend):
        import a2a

        self.a2a, self.ranks = a2a, ranks
        self.comm = a2a.Comm(
            rank=rank, num_ranks=ranks, num_experts=EXPERTS, max_topk=TOPK, max_hidden=HIDDEN, max_tokens=TOKENS,
            token_dtype="float32", backend=backend, unique_id=group,
            setup_timeout_ms=20000, first_step_timeout_ms=TIMEOUT_MS, timeout_ms=TIMEOUT_MS,
        )
        self.routing = self.comm.routing()
        tokens = [[100.0 * rank + t + 1] * HIDDEN for t in range(TOKENS)]
        pairs = [[(rank + t) % EXPERTS, (rank + 3 * t + 4) % EXPERTS] for t in range(TOKENS)]
        owners = [len({self.owner(e) for e in p}) for p in pairs]
        self.expected = [[x * n for x in token] for token, n in zip(tokens, owners)]
        self.tokens, self.ids = a2a.from_list(tokens, "float32"), a2a.from_list(pairs, "int32")
        self.status = a2a.empty(4 + ranks, "int32")

    def owner(self, expert):
        return [r for r in range(self.ranks) for _ in range(EXPERTS // self.ranks + (r < EXPERTS % self.ranks))][expert]

    def step(self, at=lambda point: None):
        comm, routing, out = self.comm, self.routing, dict(status=self.status)
        at("before")
        comm.dispatch(routing, self.tokens, self.ids, phase=self.a2a.SEND)
        at("dispatch_sent")
        received = comm.dispatch_recv(routing, want=["tokens"], out=out)
        at("dispatched")
        results = comm.combine_buffer(routing).copy_from(received.tokens)
        comm.combine(routing, results, phase=self.a2a.SEND)
        at("combine_sent")
        assert comm.combine_recv(routing, status=self.status).tolist() == self.expected

    def close(self):
        self.routing.close()
        self.comm.close()


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
    me = Rank(rank, RANKS, bytes.fromhex(group), backend)
    me.step()
    me.step()

    def strike(at):
        if at == point and rank == victim:
            os.kill(os.getpid(), number)

    text, took = timed(lambda: me.step(strike))
    status = me.status.tolist()
    again, again_took = timed(me.step) if text != "ok" else ("", 0.0)
    error = me.comm.async_error()
    _, destroyed = timed(me.close)
    print(json.dumps({
        "text": text, "took": took, "status": status, "again": again, "again_took": again_took,
        "error": error and error.status, "lost": error and error.lost_ranks, "destroyed": destroyed,
    }), flush=True)

    # The survivors' new group: ranks close up.
    group = sys.stdin.readline().strip()
    if group:
        place = rank - (rank > victim)
        new = Rank(place, RANKS - 1, bytes.fromhex(group), backend)
        print(json.dumps({"text": timed(new.step)[0]}), flush=True)
        new.close()


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "python"))
    child(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
    sys.exit()

import pytest  # noqa: E402  (the child needs none)


def new_group():
    import a2a

    return bytes(a2a.UniqueId.create())


class Processes:
    """The rank processes of one case; all of them are gone when it ends, whatever ended it."""

    def __init__(self, backend, point, number):
        group = new_group().hex()
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
    assert result["error"] == (17 if name[0] == signal.SIGKILL else 16) and VICTIM in result["lost"], result
    assert statuses[0] in result["again"] and result["again_took"] < 0.5, result
    assert result["destroyed"] < 1.0 + GRACE, result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_is_gone(backend, point, number):
    survivors = [rank for rank in range(RANKS) if rank != VICTIM]
    promise = 1.0 if number == signal.SIGKILL else TIMEOUT_MS / 1000 + 1.0
    with Processes(backend, point, number) as processes:
        for rank in survivors:
            result = processes.line(rank)
            if point == "combine_sent":
                # Its last flag had come: nobody misses it in this step.
                assert result["text"] == "ok", result
            else:
                check_survivor((number, point), result, promise)
        # The new group works, before and after the late rank is back and has finished its void step.
        group = new_group().hex()
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
def test_nothing_is_left_behind(backend):
    def cycle(ranks):
        group = new_group()
        failures = []

        def run(rank):
            try:
                member = Rank(rank, ranks, group, backend)
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

    gc.collect()
    others = held()[2]
    cycle(RANKS)
    before = held()
    for _ in range(25):
        cycle(RANKS)
    assert held() == before
    assert before[2] <= others
