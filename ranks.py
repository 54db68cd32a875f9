"""Processes that work together, as torchrun starts them: who they are, what they send one another, and what ends them.

Does: join torch.distributed's group, count the bytes that are sent, and watch the others: where one dies, hangs or
fails, all end within a minute, and one line names it. Does not: start processes (torchrun does), or say what is shared
out among them: the keys of one prompt (parallel.py), the trials of an evaluation (cli.py), matrices (shards.py).

    torchrun --nproc-per-node 4 generate.py --method mesa

    ranks = join("generate.py")             # Ranks(rank=2, size=4); Ranks() where torchrun has not started this process
    parts = ranks.gather(part, "merge")     # the tensor of every rank
"""
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = 30.0   # seconds after which a rank that does not answer, or lets the others wait, is given up
LOADING = 20     # times as long it may take to load its weights
FOREVER = timedelta(days=30)  # the limit of torch's own waits: the watch has another, and says who is late


@dataclass
class Life:
    """What a process tells the others of itself."""
    state: str = "starting"   # "computing", "waiting" for others, "alone": needs nobody, "asking": reads stdin, "done"
    progress: int = 0         # rises with every layer and every exchange
    lock: object = field(default_factory=threading.Lock)


@dataclass
class Ranks:
    """One process among size; what it sends is counted in sent, {what: bytes}."""
    rank: int = 0
    size: int = 1
    local: int = 1                      # how many of them are on this machine
    name: str = ""                      # of the script, in front of the line that says why all end
    timeout: float = TIMEOUT
    store: object = None                # torch.distributed's, for what is not a tensor
    group: object = None                # torch.distributed's, None: all processes
    has_nccl: bool = False
    sent: Counter = field(default_factory=Counter)
    life: Life = field(default_factory=Life)
    stderr: object = None
    whole: object = None                # the Ranks that these are a part of, see split

    # ---- what travels

    def post(self, sends, receives, what):
        """Begin to send and to receive: lists of (peer, tensor), in the same order on both sides. For finish()."""
        ops = []
        for peer, tensor in sends:
            self.sent[what] += tensor.nbytes
            ops.append(dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer))
        ops += [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for peer, tensor in receives]
        return dist.batch_isend_irecv(ops) if ops else []

    def finish(self, works):
        """Wait for what post() has begun."""
        if not works:
            return
        self.life.state = "waiting"
        for work in works:
            work.wait()
        self.step()

    def gather(self, x, what):
        """The tensors x of all ranks, of one shape, as (size, *x.shape)."""
        out = [torch.empty_like(x) for _ in range(self.size)]
        self.sent[what] += x.nbytes * (self.size - 1)
        self.life.state = "waiting"
        dist.all_gather(out, x.contiguous(), group=self.group)
        self.step()
        return torch.stack(out)

    def sum(self, x, what):
        """The sum of the tensors x of all ranks, in place and returned: a ring sends 2 (size - 1)/size of x."""
        self.sent[what] += 2 * x.nbytes * (self.size - 1) // self.size
        self.life.state = "waiting"
        dist.all_reduce(x, group=self.group)
        self.step()
        return x

    def agree(self, x):
        """Rank 0's tensor x, on every rank, also those that these are a part of."""
        ranks = self.whole or self
        if ranks.size > 1:
            self.life.state = "waiting"
            dist.broadcast(x, group=ranks.group, group_src=0)
            self.step()
        return x

    def share(self, make, state="starting"):
        """make() of rank 0, some plain data, on every rank; what it is to wait for it is said by state."""
        if self.size == 1:
            return make()
        before = self.life.state
        self.life.state = state
        box = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(box, 0)
        self.life.state = before
        self.life.progress += 1
        return box[0]

    def everyone(self, data):
        """The list of every rank's plain data."""
        found = [None] * self.size
        dist.all_gather_object(found, data)
        self.life.progress += 1
        return found

    def least(self, count):
        """The smallest of a number of every rank's."""
        return count if self.size == 1 else min(self.everyone(count))

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def claim(self, job):
        """Whether this rank is the first to ask for a job, a text: what is shared out is done once."""
        return self.size == 1 or self.store.add(f"job/{job}", 1) == 1

    def step(self):
        self.life.progress += 1
        self.life.state = "computing"

    def models(self, T):
        """How many whole models these processes have, each cut in T. ValueError where T does not divide size."""
        if self.size % T:
            raise ValueError(f"--tensor-parallel {T}: torchrun must start a multiple of {T} processes, not {self.size}")
        return self.size // T

    def split(self, T):
        """(keys, matrices): this process among those that have the same part of a model cut in T, and among those T.

        Of 6 ranks with T = 2, rank 3 is rank 1 of 1 3 5 and rank 1 of 2 3. ValueError where T does not divide size.
        """
        self.models(T)
        same_part = [list(range(part, self.size, T)) for part in range(T)]
        same_model = [list(range(first, first + T)) for first in range(0, self.size, T)]
        return self.part(same_part), self.part(same_model)

    def part(self, divided):
        """The Ranks of this process within that of the divided lists of ranks which it is in."""
        found = None
        for members in divided:  # every process makes every group
            group = dist.new_group(members, timeout=FOREVER)
            if self.rank in members:
                found = replace(self, rank=members.index(self.rank), size=len(members), group=group, sent=Counter(),
                                whole=self)
        return found

    # ---- what must be the same everywhere

    def check_same(self, **texts):
        """ValueError, on all ranks alike, unless each of the texts is the same on all: it names those that differ."""
        if self.size == 1:
            return
        found = self.everyone(texts)
        for what in texts:
            values = [theirs[what] for theirs in found]
            usual = Counter(values).most_common(1)[0][0]
            others = [rank for rank, value in enumerate(values) if value != usual]
            if others:
                which = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(map(str, others))} have"
                raise ValueError(f"{which} another {what} than the other ranks")

    # ---- the end

    def complain(self, text):
        """Print a line on stderr that one rank alone prints: rank 0, or this one where rank 0 has nothing to say."""
        if self.size == 1:
            print(text, file=sys.stderr, flush=True)
            return
        self.life.state = "done"  # this rank ends by itself
        self.store.set(f"complaint/{self.rank}", text)
        limit = time.monotonic() + 10
        while self.rank and time.monotonic() < limit:
            if self.store.check(["complaint/0"]):
                return
            time.sleep(0.1)
        where = "" if self.rank == 0 else f"rank {self.rank}: "
        print(f"{self.name}: {where}{text.removeprefix(f'{self.name}: ')}", file=self.stderr, flush=True)
        self.store.set("stop", text)

    def leave(self, code):
        """End this process, with the others where all is well. Returns only where it is alone."""
        if self.size == 1:
            return
        sys.stdout.flush()
        if code == 0:
            self.life.state = "alone"  # who comes first may wait as long as the others work
            dist.barrier()
        self.life.state = "done"
        try:
            beat(self, -1)
            limit = time.monotonic() + (10 if code == 0 else 3)
            while self.rank == 0 and time.monotonic() < limit:  # it may be the one that holds the store
                if all(self.store.get(f"beat/{rank}").endswith(b"done") for rank in range(self.size)):
                    break
                time.sleep(0.02)
        finally:
            os._exit(code if isinstance(code, int) else 2)  # torch's threads abort now and then at an ordinary exit

    def blame(self, error, seconds=5):
        """After a failed exchange: give the watch time to find who is to blame and to end this process."""
        time.sleep(seconds)
        sys.stderr = self.stderr  # nobody else is: an error of this rank's own, to be shown in full
        raise error


def join(name):
    """The Ranks of this process: torchrun's environment says who it is. Only rank 0 keeps its stdout and stderr."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Ranks()
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=LOADING * TIMEOUT))))
    local = int(os.environ.get("LOCAL_RANK", rank))
    has_nccl = torch.cuda.is_available() and torch.cuda.device_count() > local
    if has_nccl:
        torch.cuda.set_device(local)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    has_nccl = has_nccl and torch.cuda.device_count() >= here
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", store=store, rank=rank, world_size=size,
                            timeout=FOREVER)
    ranks = Ranks(rank, size, here, name, store=new_client(), has_nccl=has_nccl, stderr=sys.stderr)
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    start_watch(ranks, new_client())
    return ranks


def new_client():
    """A connection of its own to the store of this run, as two threads cannot use one at a time."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"beyond/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


# ---------------------------------------------------------------------------------------------------------------------
# the watch: a thread that tells the others that this process lives, and looks whether they do

@dataclass
class Pulse:
    """What one rank knows of another, with the seconds since that has changed."""
    state: str
    quiet: float       # since it last said anything
    still: float       # since its progress last rose
    is_gone: bool      # its process is on this machine and has ended


def verdict(pulses, timeout):
    """The (rank, what it did) for which all have to end, None where all is well. pulses: the Pulse of every rank."""
    for rank, pulse in enumerate(pulses):
        if pulse.is_gone and pulse.state != "done":
            return rank, "has died"
    for rank, pulse in enumerate(pulses):
        if pulse.state != "done" and pulse.quiet > timeout:
            return rank, f"has not answered for {timeout:.0f} seconds"
    waiting = [pulse for pulse in pulses if pulse.state == "waiting" and pulse.still > timeout]
    for rank, pulse in enumerate(pulses):
        limit = {"computing": timeout, "starting": LOADING * timeout}.get(pulse.state)
        if waiting and limit and pulse.still > limit:
            return rank, f"has kept the others waiting for {limit:.0f} seconds (--timeout)"
    if len(waiting) == len(pulses):
        return 0, f"and all others have waited for one another for {timeout:.0f} seconds"
    return None


def start_watch(ranks, store):
    """Begin to watch. A SIGTERM, by which torchrun ends all when one has failed, wakes the watch to say which."""
    store.set(f"place/{ranks.rank}", f"{os.getpid()} {socket.gethostname()}")
    beat(ranks, 0, store)
    dist.barrier()
    woken, waking = socket.socketpair()
    waking.setblocking(False)
    woken.settimeout(1.0)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
    places = [store.get(f"place/{rank}").decode().split() for rank in range(ranks.size)]
    threading.Thread(target=watch, args=(ranks, store, places, woken, waking), daemon=True).start()


def watch(ranks, store, places, woken, waking):
    """The thread: beat and look once a second, until somebody is to blame."""
    changed = [[None, 0.0, None, 0.0] for _ in places]   # of every rank: its beat, when it came; its progress, when
    number = 0
    try:
        while ranks.life.state != "done":
            number += 1
            beat(ranks, number, store)
            is_ended = was_signalled(woken)
            if ranks.life.state != "done" and store.check(["stop"]):
                os._exit(1)                              # whoever failed has said why
            gone = [is_gone(place) for place in places]  # before their beats: who ends well says so first
            pulses = [pulse_of(store, rank, changed[rank], gone[rank]) for rank in range(ranks.size)]
            found = verdict(pulses, ranks.timeout)
            if found and ranks.life.state != "done":
                end_all(ranks, store, places, pulses, *found)
            if is_ended:
                stop_by_signal(ranks, store, places, changed)
    except (RuntimeError, OSError):                      # the store is gone, and with it the process that held it
        if ranks.life.state != "done":
            print(f"{ranks.name}: rank {ranks.rank} has lost rank 0 or torchrun", file=ranks.stderr, flush=True)
            os._exit(1)


def beat(ranks, number, store=None):
    """Tell the others the number of this beat, the progress and the state of this rank."""
    with ranks.life.lock:  # so that "done" is the last word
        (store or ranks.store).set(f"beat/{ranks.rank}", f"{number} {ranks.life.progress} {ranks.life.state}")


def was_signalled(woken):
    """Wait a second; whether a SIGTERM came."""
    try:
        return signal.SIGTERM in woken.recv(64)
    except TimeoutError:
        return False


def pulse_of(store, rank, changed, gone):
    """The Pulse of a rank; changed: what is remembered of its beats, which this keeps up to date."""
    number, progress, state = store.get(f"beat/{rank}").decode().split()
    now = time.monotonic()
    if number != changed[0]:
        changed[0:2] = number, now
    if (progress, state) != changed[2]:
        changed[2:4] = (progress, state), now
    return Pulse(state, now - changed[1], now - changed[3], gone)


def is_gone(place):
    """Whether the process at a place, [pid, host], is on this machine and has ended."""
    pid, host = int(place[0]), place[1]
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except OSError:  # no /proc here
        return False


def end_all(ranks, store, places, pulses, guilty, deed):
    """End this process; the first rank that lives says why, the others give it some seconds to do so."""
    living = [rank for rank, pulse in enumerate(pulses) if rank != guilty and not pulse.is_gone]
    if ranks.rank == min(living, default=ranks.rank):
        pid, host = places[guilty]
        print(f"{ranks.name}: rank {guilty} (process {pid} on {host}) {deed}; all ranks end", file=ranks.stderr,
              flush=True)
        store.set("stop", deed)
        os._exit(1)
    for _ in range(30):
        if store.check(["stop"]):
            break
        time.sleep(0.1)
    os._exit(1)


def stop_by_signal(ranks, store, places, changed):
    """After a SIGTERM: say who has ended, if somebody has; else end quietly."""
    for _ in range(10):
        gone = [is_gone(place) for place in places]
        pulses = [pulse_of(store, rank, changed[rank], gone[rank]) for rank in range(ranks.size)]
        found = verdict(pulses, ranks.timeout)
        if found:
            end_all(ranks, store, places, pulses, *found)
        if store.check(["stop"]):
            os._exit(1)
        time.sleep(0.1)
    store.set("stop", "a signal")
    os._exit(143)
