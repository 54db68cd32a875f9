"""When does Position Interpolation reach the new window sooner than direct fine-tuning? A table in miniature.

Does: fine-tune a small model at 2, 4 and 8 windows, with PI, with plain RoPE (direct fine-tuning), and with PI whose
factor and length grow together; measure effective window (k_max), passkey, lines and loss after so many steps, on
several seeds; the same for other bases (theta, head width), which train.py makes first. Every part is a command of this
repository, printed before it runs, and each goes on where it was, so this one does too. Does not: choose a learning
rate by the seeds that it reports; --lr is for all runs alike.

    python -m experiments.pi --out runs/pi                                       # the table for tiny, three seeds
    python -m experiments.pi --out runs/pi --bases tiny,theta=10000,heads=2      # for models that differ in one thing
    python -m experiments.pi --out runs/pi --seeds 11 --windows 4 --lr 3e-4      # a rate, on a seed that no table has
    python -m experiments.pi --out runs/pi --commands                            # what is left to run, and nothing more

A base is the name of a checkpoint, or settings of train.py joined by "+": theta=10000, heads=2 (heads twice as wide,
with twice the slow channels), width=192, theta=10000+heads=2. (arXiv 2306.15595, sections 3.2 and 3.3; tables 3 and 4.)
"""
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from checkpoint import find_checkpoint, refuse_unfinished
from cli import accuracy, counts, markdown, number, plain_parser, read_rows, run_command, say, select
from config import Config
from eval_passkey import KMAX_CELLS, KMAX_TRIALS, kmax

METHODS = ("pi", "direct", "pi-grow")
TRAIN_FLAGS = {"theta": "--rope-theta", "heads": "--heads", "kv": "--kv-heads", "width": "--width",
               "layers": "--layers"}
ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------------------------
# what is run

def base_folder(args, base):
    """The folder of a base model: a checkpoint, or what train.py is to write."""
    return args.out / f"base-{base}" if "=" in base else find_checkpoint(base)


def base_command(args, base):
    """The words of train.py for a base that is settings; all else as train.py has it."""
    words = ["train.py", "--out", str(base_folder(args, base)), "--steps", str(args.base_steps), "--grow",
             str(args.base_steps // 2)]
    for setting in base.split("+"):
        name, _, value = setting.partition("=")
        if name not in TRAIN_FLAGS:
            raise ValueError(f"--bases {base}: settings are {', '.join(TRAIN_FLAGS)}")
        words += [TRAIN_FLAGS[name], value]
    return words


def run_folder(args, base, method, windows, seed):
    """The folder of one fine-tuning; its steps are folders in it."""
    return args.out / f"{base}-{method}-{windows}x-lr{args.lr:g}-{args.steps[-1]}-seed{seed}"


def tune_command(args, base, method, windows, seed, L):
    """The words of finetune.py for one fine-tuning."""
    text = "rope" if method == "direct" else f"pi:factor={windows}"
    words = ["finetune.py", "--init", str(base_folder(args, base)), "--method", text, "--seq-len", str(windows * L),
             "--steps", str(args.steps[-1]), "--lr", f"{args.lr:g}", "--seed", str(seed), "--keep",
             ",".join(str(step) for step in args.steps), "--save-every", str(args.save_every), "--out",
             str(run_folder(args, base, method, windows, seed))]
    if method == "pi-grow":
        words += ["--grow", str(max(1, args.steps[-1] // 4))]
    return words


def measure_commands(args, folder, method, n, L):
    """The words of the evaluations of one folder at the new window and at the old one, as its config.json says."""
    name = "rope" if method == "direct" else "pi"
    passkey = ["eval_passkey.py", "--ckpt", str(folder), "--methods", name]
    results = str(args.out / "passkey.jsonl")
    return [
        [*passkey, "--kmax", "--lengths", str(n), "--results", results],
        [*passkey, "--task", "lines", "--lengths", str(n), "--trials", str(args.trials), "--results", results],
        [*passkey, "--lengths", str(L), "--trials", str(args.trials), "--results", results],
        [*passkey, "--task", "lines", "--lengths", str(L), "--trials", str(args.trials), "--results", results],
    ]


def is_measured(args, folder):
    """Whether all rows of measure_commands are in the results."""
    rows = [row for row in args.rows if row["ckpt"] == str(folder)]
    return len(rows) >= KMAX_CELLS * KMAX_TRIALS + 3 * 5 * args.trials  # five depths each


def execute(args, words):
    """Print a command, and run it in the repository; ValueError where it fails."""
    say("$ python " + shlex.join(words))
    if args.commands:
        return
    done = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise ValueError(f"{words[0]} ended with exit code {done.returncode}")


def is_finished(folder):
    """Whether a training has written this folder to its end."""
    return (folder / "training.json").is_file()


def run_all(args):
    """Everything that is not there yet."""
    for base in args.bases:
        if "=" in base and not is_finished(base_folder(args, base)):
            execute(args, base_command(args, base))
        L = window_of(args, base)
        for seed in args.seeds:
            for windows in args.windows:
                for method in args.methods:
                    run_one(args, base, method, windows, seed, L)


def window_of(args, base):
    """The window of a base model; that of train.py where it is not there yet."""
    folder = base_folder(args, base)
    return Config.from_hf(folder).train_len if is_there(folder) else 256


def is_there(folder):
    return (folder / "model.safetensors").is_file()


def run_one(args, base, method, windows, seed, L):
    """One fine-tuning, and the evaluations of all its steps."""
    folder = run_folder(args, base, method, windows, seed)
    if not is_finished(folder):
        execute(args, tune_command(args, base, method, windows, seed, L))
    for step in args.steps:
        step_folder = folder / f"step-{step}"
        if not is_measured(args, step_folder):
            for words in measure_commands(args, step_folder, method, windows * L, L):
                execute(args, words)
    args.rows = read_rows(args.out / "passkey.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# the table

def measures(args, base, method, windows, seed, step, L):
    """{name: number} of one folder: k_max, furthest hit, passkey and lines at the new and the old window, losses."""
    folder = run_folder(args, base, method, windows, seed)
    n = windows * L
    rows = [row for row in args.rows if row["ckpt"] == str(folder / f"step-{step}")]
    cells = [row for row in rows if row["depths"] == KMAX_CELLS and row["length"] == n]
    name = cells[0]["method"]
    curve = {entry["step"]: entry for entry in json.loads((folder / "training.json").read_text())["curve"]}
    found = {"k_max": kmax(cells, name, n), "passkey": accuracy(cells),
             "lines": accuracy(select(rows, task="lines", length=n)),
             "passkey old": accuracy([row for row in select(rows, task="passkey", length=L) if row not in cells]),
             "lines old": accuracy(select(rows, task="lines", length=L))}
    entry = curve.get(step)
    if entry:
        found |= {"loss": entry["validation"], "loss old": entry["old_window"]}
    return found


def report(args):
    """A table for every base and window: methods and steps down, measures across, mean and spread over the seeds."""
    for base in args.bases:
        L = window_of(args, base)
        for windows in args.windows:
            lines = []
            for method in args.methods:
                for step in args.steps:
                    found = [measures(args, base, method, windows, seed, step, L) for seed in args.seeds]
                    lines.append([method, step, *(spread([each.get(name) for each in found]) for name in columns())])
            print(f"\n{base}: {windows} windows of {L} tokens, lr {args.lr:g}, {len(args.seeds)} seeds "
                  "(mean ± standard deviation)")
            print(markdown(["method", "steps", *columns()], lines))


def columns():
    return ("k_max", "passkey", "lines", "loss", "passkey old", "lines old", "loss old")


def spread(values):
    """"0.52 ± 0.03" of a number per seed; "" where one is missing."""
    if None in values:
        return ""
    digits = 0 if max(values) > 20 else 2
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_args(argv):
    parser, flag = plain_parser(__doc__)
    flag("out", type=Path, required=True, metavar="FOLDER", help="for models and results")
    flag("bases", type=lambda text: text.split(","), default=["tiny"], metavar="B,B,...",
         help="checkpoints, or settings of train.py: theta=10000, heads=2, theta=10000+heads=2, ...")
    flag("methods", type=lambda text: text.split(","), default=list(METHODS), metavar="M,M,...",
         help=f"of {', '.join(METHODS)}; default: all")
    flag("windows", type=counts, default=[2, 4, 8], metavar="N,N,...", help="new window over old one")
    flag("steps", type=steps, default=[0, 50, 200, 500, 1000], metavar="N,N,...", help="when to measure")
    flag("seeds", type=counts, default=[1, 2, 3], metavar="N,N,...")
    flag("lr", type=number(float, 1e-9, 1), default=7e-4, help="of all runs")
    flag("trials", type=number(int, 1), default=8, help="prompts in each of five depths of passkey and lines")
    flag("base-steps", type=number(int, 2), default=2400, help="of train.py, for bases that are settings")
    flag("commands", action="store_true", help="print the commands that are left to do, and stop")
    args = parser.parse_args(argv)
    if not set(args.methods) <= set(METHODS):
        parser.error(f"--methods: there are {', '.join(METHODS)}")
    return args


def steps(text):
    """An argparse type: "0,50" -> [0, 50], rising."""
    return sorted({0 if part.strip() == "0" else counts(part)[0] for part in text.split(",")})


def run(argv=None):
    """The command: its exit code."""
    args = parse_args(argv)
    if args.steps[-1] == 0:
        raise ValueError("--steps 0: nothing is trained")
    args.save_every = common_step(args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    for base in args.bases:
        if "=" not in base:
            refuse_unfinished(find_checkpoint(base))
    args.rows = read_rows(args.out / "passkey.jsonl")
    run_all(args)
    if not args.commands:
        report(args)
    return 0


def common_step(steps):
    """The largest number of steps, up to 50, after which every one of these is a save, so that the curve has it."""
    return max(size for size in range(1, 51) if all(step % size == 0 for step in steps))


if __name__ == "__main__":
    run_command(run, "pi.py")
