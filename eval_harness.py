"""Any task of EleutherAI's lm-evaluation-harness, by method: the model in transformers, extended by hf.py.

Does: hand an extended model to the harness, method after method, and print the tables of the harness. Does not: choose
prompts or scores. The harness downloads what a task asks for; a task of your own is a YAML file in --include-path.
Sequences run one at a time, as the harness pads batches at the right, and a method would take the padding for prompt.

    pip install 'lm-eval[hf]' && python eval_harness.py --tasks lambada_openai --methods rope,mesa --ckpt llama-7b
"""
import hf
from checkpoint import find_checkpoint, refuse_unfinished
from cli import method_list, new_parser, number, pick_device, pick_dtype, run_command, say, settings_line, type_name
from positions import Method


WINDOWS = 64  # that a document may be long


def harness():
    """The package lm_eval; ValueError with one clear sentence where it is missing."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise ValueError(f"eval_harness.py needs the harness (pip install 'lm-eval[hf]'): {error}") from None
    return lm_eval


def evaluate(model, tokenizer, tasks, max_length=None, include_path=None, limit=None, num_fewshot=None):
    """What lm_eval.simple_evaluate finds for an extended transformers model on a list of tasks.

    max_length: the tokens that the harness keeps of a document; by itself it would cut them to the model's window. By
    default WINDOWS of them.

    ValueError for tasks that the harness does not know.
    """
    lm_eval = harness()
    manager = lm_eval.tasks.TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}")
    max_length = max_length or WINDOWS * hf.positions_of(model).train_len
    wrapped = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1,
                                                max_length=max_length)
    return lm_eval.simple_evaluate(wrapped, tasks=tasks, task_manager=manager, limit=limit, num_fewshot=num_fewshot)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_args(argv):
    parser, flag = new_parser(__doc__)
    flag("methods", "method", type=method_list, metavar="M,M,...", help="as in eval_passkey.py")
    flag("tasks", "task", required=True, metavar="T,T,...", help="names of tasks")
    flag("include-path", metavar="FOLDER", help="where YAML files of further tasks lie")
    flag("max-length", type=number(int, 1), help="tokens kept of a document, its last ones, and those of a rolling "
         f"perplexity's windows; default: {WINDOWS} windows of the model")
    flag("limit", type=number(int, 1), help="use only the first so many documents of a task")
    flag("num-fewshot", type=number(int, 0), help="examples in front of every document; default: the task's")
    args = parser.parse_args(argv)
    if args.quantize or args.impl != "auto":
        parser.error("--quantize and --impl are not there for a model that runs through transformers")
    return args


def run(argv=None):
    """The command: its exit code."""
    args = parse_args(argv)
    table = harness().utils.make_table
    path = find_checkpoint(args.ckpt)
    refuse_unfinished(path)
    methods = [Method.parse(text) for text in args.methods or [""]]
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, hf.stored_type(path), device)
    tokenizer = hf.from_folder(path, "AutoTokenizer.from_pretrained")
    model = hf.from_folder(path, "AutoModelForCausalLM.from_pretrained", dtype=dtype).to(device).eval()
    for method in methods:
        hf.extend(model, method, args.train_len)
        name = str(method) or "config.json's method"
        say(settings_line({"ckpt": args.ckpt, "method": name, "tasks": args.tasks, "dtype": type_name(dtype)}))
        found = evaluate(model, tokenizer, args.tasks.split(","), args.max_length, args.include_path, args.limit,
                         args.num_fewshot)
        print(f"{name}\n{table(found)}", flush=True)
    return 0


if __name__ == "__main__":
    run_command(run, "eval_harness.py")
